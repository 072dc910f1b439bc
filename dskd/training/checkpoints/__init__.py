"""Checkpoints, from which training resumes and exports are made.

checkpoint  the format: finding, checking and comparing those on disk
writing     writes the checkpoint of an engine, and removes older ones
loading     loads a checkpoint into an engine
universal   converts a checkpoint for another number of ranks
"""
