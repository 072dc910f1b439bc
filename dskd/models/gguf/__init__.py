"""A teacher from a GGUF file, made into an ordinary folder. `files/gguf_file.py` reads the file.

known_files  names the models of files that do not name them rightly, by their content
config       the config of that model, and the check that transformers leaves nothing out
tokenizer    builds its tokenizer, or compares another with it
teacher      writes the folder
"""
