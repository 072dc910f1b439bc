"""Text to documents: `WORKDIR/corpus`.

build    the stage: WordNet's text, files, a dataset or benchmarks to documents, split into training and held-out ones
finding  paths, folders and globs to files of text, and what is left out
files    documents of a file: text, JSON, Parquet, Arrow or MDS (opening, records, tables)
hub      documents of a Hugging Face dataset
tasks/   documents of the paper's benchmarks
packing, sequences
         documents to sequences of tokens: `WORKDIR/sequences`
"""
