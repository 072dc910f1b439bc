"""Turns text into documents, `WORKDIR/corpus`, and documents into sequences of tokens, `WORKDIR/sequences`.

build      the stage: reads documents from WordNet, files, a dataset, benchmarks or chats, and splits off held-out ones
finding    finds the text files that paths, folders and globs name, and records what it leaves out
files      reads the documents of a file: text, JSON, Parquet, Arrow or MDS
opening    opens text files, compressed or not
records    reads records from JSON files, and the text of a record
tables     reads records from files with columns
hub        reads the documents of a Hugging Face dataset
chats/     reads chats, as tokens with a mask of the assistant's answers
written/   lets the teacher write the text, about the senses of words
tasks/     reads the documents of the paper's benchmarks
sequences  the stage that turns documents into sequences of tokens
packing    packs documents into sequences of equal length
template_options  the variables of chat templates, such as a date that is the same every day
"""
