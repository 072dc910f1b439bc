"""Checks of a model before its results are trusted.

room          checks that a model to be made fits into memory and onto the disk
architecture  checks a teacher or a pretrained student by its config.json, before anything runs
head_probe    finds out what a model does with the products of its output matrix, or refuses it
probes        checks that a model does what training assumes, such as keeping packed documents apart
reference     checks that a loaded model computes what transformers' own computes from the same folder
loading       loads a folder as its users do, and refuses one that lacks weights
agreement     checks that an export computes what the student in training computes
"""
