"""Planning a job before it runs: the memory, time and disk that it needs, from the shapes of its models (`dskd plan`).

1 GB is 2^30 bytes, as everywhere in `dskd`. Memory is what training would allocate: it is counted by running
training's code on tensors that have shapes but no memory, and what DeepSpeed is known to hold is added.
benchmarks/plan_memory.py compares the result to real training. Speed is an estimate from assumptions that its text
names.

plan            puts a job's memory, time and disk space together, and decides whether it fits
cluster         the machines, and the speeds that are assumed for them
architecture    finds, fetches and checks the config.json of teacher and student
shapes          the shapes of teacher and student, from their architectures
known_models    shapes of models whose config.json needs a licence or a network
memory          the bytes on each GPU and in each host's memory
student_memory  those of the weights of the student and of its optimizer
running         runs an architecture without weights, under FakeTensorMode
live_bytes      counts the bytes that are alive during such a computation
activations     the memory of one micro-batch beyond the weights, counted that way
gathering       simulates which parameters ZeRO-3 gathers while a model runs
speed           estimates how long training takes
disk            the disk space of the artifacts
stored          which of the teacher's states are stored in the shards, and which a run reads
stored_speed    compares reading stored states with computing them
writing         estimates how long the teacher takes to write the text itself
changes         finds the smallest change with which a job fits
report          formats a plan as text
preflight       checks the nodes of a job just before it starts
"""

from dskd.config.section import GB
