"""The command line: a module for each verb of `dskd`, with its parser and its run function, and four others
(`program`, `launching`, `evaluate` and `results`).

program    shared by all programs: arguments, overrides, ranks, exit codes
launching  starts a program of `launcher/` on all ranks
evaluate   the options of `launcher/evaluate.py`
lexicon    reads synonyms and antonyms
student    makes the student, or shows which layers it could keep
export     makes a Hugging Face model from a checkpoint
config     explains the keys, or checks a file
wordnet    finds WordNet on this machine
smollm2    fetches the teacher of configs/quickstart.yaml
status     prints the progress of a run
preflight  checks the nodes of a job
plan       predicts memory, time and disk space
compare    compares runs
inspect    shows what was built
senses     measures and merges sense dictionaries
results    what the pipeline prints at its end
"""
