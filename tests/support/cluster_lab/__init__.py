"""A small cluster on one machine, for tests: hosts made of kernel namespaces, and a real SLURM on them."""
