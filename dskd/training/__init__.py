"""Training: the data, the models, the loop and the files it writes.

train                    the loop
step                     one optimizer step: its data, and how it is computed
freed_memory             keeps memory that a step frees for the next one
run                      everything that the loop uses; yields the steps, each with its data
setup                    prepares that from the config
inputs                   opens and checks what training reads, and hashes it into the run's recipe
schedule                 the number of steps, their batch sizes and learning rates
records                  a run's metrics, tags and first lines
status                   prints the progress of a run
loader                   reads the shards, and has the data of the next steps ready on the device
collator                 turns samples into micro-batches
packed_step              puts the data of a step into one buffer, and copies it to the device
positions                chooses the positions that get a sense term
distribution_candidates  chooses the sense rows that the distribution form compares
sense_bank               all sense embeddings on the device
teacher_source           what training reads of the teacher: a loaded teacher, or the shards
pair                     teacher and student on a rank
trunk_check              checks that the student computes what the teacher does above the layers that they share
student                  the student in a ZeRO-3 engine
width_map                maps the states of a student of another width to the teacher's
width_fit                the least-squares fit from which that map starts
checkpoint               the format of checkpoints: finding, checking and comparing those on disk
checkpoint_writing       moves a checkpoint between an engine and the disk: writes it, and loads it again
universal_checkpoint     converts a checkpoint for another number of ranks
exporting/               makes the exported model of a checkpoint, with its model card; and rehearses that
teacher_from_scratch     trains a small teacher, for when there is none to download
muon                     the optimizer of that teacher's matrices in float32
"""
