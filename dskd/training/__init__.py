"""Training: the data, the models, the loop and the files it writes.

train                 the loop
step                  one optimizer step: its data, and how it is computed
freed_memory          keeps memory that a step frees for the next one
prepared_run          everything that the loop uses; yields the steps, each with its data
setup                 prepares that from the config
inputs                opens and checks what training reads, and hashes it into the run's recipe
schedule              the number of steps, their batch sizes and learning rates
width_fit             the least-squares fit from which the map to the teacher's width starts
records               a run's metrics, tags and first lines
status                prints the progress of a run
data/                 from shards to the data of each step on the device
models/               teacher and student on a rank
checkpoints/          the format of checkpoints; writing and loading them
exporting/            makes the exported model of a checkpoint, with its model card; and rehearses that
teacher_from_scratch  trains a small teacher, for when there is none to download
muon                  the optimizer of that teacher's matrices in float32
"""
