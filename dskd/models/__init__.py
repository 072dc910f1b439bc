"""Causal language models of transformers: their folders, and how they are loaded, run and checked.

folder          a model's folder on disk or on the Hub: finding it, checking it, and its digest
digests         the digests of a model's files, each hashed once
smollm2         fetches the quickstart's teacher
gguf/           converts a GGUF file into the teacher's folder
model_config    reads a folder's config.json for the installed transformers, or refuses it
weights         the tensors in a folder's safetensors files
stored_names    the names of a model's tensors in those files, and the check that none is missing or left over
tokenizing      runs a tokenizer, also on texts that are too long for one call
words           the tokens of a word as it is inside a text, and in other forms
room            checks that a model to be made fits into memory and onto the disk
limits          how many positions and which tokens a model takes
precision       the number format that models run in
nvme            parameters on a local disk
causal_lm       builds a causal LM and fills it with a folder's weights
layers          a model's layers: their kinds, and the states that enter and leave them
trained         which of a student's parameters are trained
trunk           the lowest layers that teacher and student share: how many, and the states that leave them
final_norm      finds the parameters of a decoder's final norm
packed_mask     builds the attention mask of packed documents
frozen          runs the teacher, whole on every rank or sharded with ZeRO-3
output_head     from last hidden states to logits: the output matrix, and what a model does with its products
head_probe      finds out what a model does with them, or refuses it
readouts        reads logits out of hidden states, chunk by chunk
generation      greedy generation, and the tokens that end it
sampling        sampled texts, with transformers' own generation
cut_config      the student's config.json
architecture    checks a teacher or a pretrained student by its config.json, before anything runs
probes          checks that a model does what training assumes, such as keeping packed documents apart
reference       checks that a loaded model computes what transformers' own computes from the same folder
loading         loads a folder as its users do, and refuses one that lacks weights
agreement       checks that an export computes what the student in training computes
"""
