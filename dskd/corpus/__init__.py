"""Text to documents: `WORKDIR/corpus`.

build  the stage: WordNet's text, files or a dataset to documents, split into training and held-out ones
files  documents of .txt, .jsonl, .parquet and MDS folders
hub    documents of a Hugging Face dataset
"""
