"""Models on disk, before anything of them is built.

folder        a model's folder on disk or on the Hub: finding it, checking it, and its digest
digests       the digests of a model's files, each hashed once
model_config  reads a folder's config.json for the installed transformers, or refuses it
weights       the tensors in a folder's safetensors files
gguf_file     reads what a GGUF file says about its model
smollm2       fetches the quickstart's teacher
"""
