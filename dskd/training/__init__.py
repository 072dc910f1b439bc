"""Training: the data, the models, the loop and the files it writes.

train, step, run, setup, schedule, inputs, records
            the loop; what it computes and uses, how that is set up, and the records of it
loader, packed_step, collator, positions, candidates, sense_bank
            the data of a step
pair, trunk, student
            teacher and student on a rank
checkpoint, saving, universal_checkpoint, export
            files on disk
teacher_from_scratch
            a small teacher, for when there is none to download
"""
