"""Planning a job before it runs: the memory, time and disk that it needs, from the shapes of its models (`dskd plan`).

GB are 2^30 bytes, as everywhere in this project. Memory is what training would allocate: it is counted by running
training's code on tensors that have shapes but no memory, and what DeepSpeed is known to hold is added.
benchmarks/plan_memory.py compares the result to real training. Speed is an estimate from assumptions that its text
names.
"""

GB = 2**30
