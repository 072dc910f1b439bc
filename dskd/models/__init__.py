"""Causal language models of transformers: their folders, and how they are loaded and run.

folder      a model's folder on disk or on the hub, and its tokenizer
weights     the tensors in a folder's safetensors files
layers      a model's layers: their kinds, and the states that enter and leave them
causal_lm   building a causal LM and filling it with a folder's weights
frozen      the teacher, whole on every rank or sharded with ZeRO-3
cutting     the student, cut from the teacher
generation  greedy generation
readouts    reading logits chunk by chunk
probes      checks that run the model, such as whether packed documents stay apart
nvme        parameters on NVMe
precision   the number format that models run in
"""
