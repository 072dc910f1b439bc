"""A small cluster on one machine, for tests: hosts that are namespaces of the kernel's, and a real SLURM on them."""
