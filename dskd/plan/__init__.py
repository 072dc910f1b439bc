"""What a job needs before it runs: memory, time and disk, from the shapes of its models alone (`dskd plan`).

GB are 2^30 bytes, as everywhere in this project. Memory is what training allocates, counted by running its code on
tensors that have shapes and no memory, and by what DeepSpeed is known to hold; benchmarks/plan_memory.py compares it
with real training. Speed is an estimate from assumptions that its text names.
"""

GB = 2**30
