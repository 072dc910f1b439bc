"""Turns text into documents, `WORKDIR/corpus`, and documents into sequences of tokens, `WORKDIR/sequences`.

build    the stage: reads documents from WordNet, files, a dataset or benchmarks, and splits off held-out ones
finding  finds the text files that paths, folders and globs name, and records what it leaves out
files    reads the documents of a file: text, JSON, Parquet, Arrow or MDS (opening, records, tables)
hub      reads the documents of a Hugging Face dataset
tasks/   reads the documents of the paper's benchmarks
packing, sequences
         turn documents into sequences of tokens
"""
