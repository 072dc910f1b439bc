"""Causal language models of transformers: their folders, and how they are built, checked and run.

tokenizing  runs a tokenizer, also on texts that are too long for one call
limits      how many positions and which tokens a model takes
words       the tokens of a word as it is inside a text, and in other forms
files/      models on disk: folders, config.json, tensors, digests; the header of a GGUF file
structure/  the parts of a model: layers, final norm, output head, trunk, trained parameters; building all of it
checks/     checks of a model before its results are trusted
running/    running a model: the frozen teacher, number formats, memory on a local disk, logits, generated texts
gguf/       converts a GGUF file into the teacher's folder

None of them imports one that is listed below it.
"""
