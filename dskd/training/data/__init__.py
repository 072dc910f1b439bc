"""The data of training: from shards to the micro-batches of each step on the device.

loader                   reads the shards, and has the data of the next steps ready on the device
collator                 turns samples into micro-batches
packed_step              puts the data of a step into one buffer, and copies it to the device
positions                chooses the positions that get a term of the loss
distribution_candidates  chooses the sense rows that the distribution form compares
sense_bank               all sense embeddings on the device
"""
