"""Training: the data, the models, the loop and what it leaves on disk.

train, step, schedule, inputs, records
            the loop, and what it sets up and records
loader, packed_step, collator, positions, candidates, sense_bank
            the data of a step
pair, trunk, student
            teacher and student on a rank
checkpoint, saving, universal_checkpoint, export
            what is on disk
teacher_from_scratch
            a small teacher, where none is given
"""
