"""Ranks: their identity, how they find each other, and their collective operations.

world          this process's rank and the number of ranks
rendezvous     how ranks find each other; which ranks are missing
collectives    sums, broadcasts and barriers
peers          finding out which other rank has ended
stopping       stopping after the same step on all ranks
node_cache     a folder that the ranks of a node share
shared_memory  room in a node's shared memory, which loaders need, and how to report that there is too little
torch_errors   recognises torch's errors of a loader's workers and of shared memory
"""
