"""Causal language models of transformers: their folders, and running them.

folder      a model's folder on disk or on the hub, and its tokenizer
weights     tensors of its safetensors files
causal_lm   the architecture: decoder, output matrix, what they are called
frozen      the teacher, whole on every rank or sharded with ZeRO-3
cutting     the student, cut from the teacher
generation  greedy generation
readouts    reading logits chunk by chunk
probes      whether documents in one sequence stay apart
nvme        parameters on NVMe
precision   the type to compute in
"""
