"""Text to documents: `WORKDIR/corpus`.

build  the stage: WordNet's text, files, a dataset or benchmarks to documents, split into training and held-out ones
files  documents of .txt, .jsonl, .parquet and MDS folders
hub    documents of a Hugging Face dataset
"""
