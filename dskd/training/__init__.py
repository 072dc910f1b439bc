"""Training: the data, the models, the loop and the files it writes.

train, step, schedule, inputs, records
            the loop, its inputs and its records
loader, packed_step, collator, positions, candidates, sense_bank
            the data of a step
pair, trunk, student
            teacher and student on a rank
checkpoint, saving, universal_checkpoint, export
            files on disk
teacher_from_scratch
            a small teacher, for when there is none to download
"""
