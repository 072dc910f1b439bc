"""Evaluations of the teacher, the untrained student and trained runs.

table              all evaluations, with their names, folders and commands
programs           what the options of `launcher/evaluate.py` run
suite              the steps that all evaluations share
models             the models that are evaluated
scores_by_example  the file of each example's scores
batching           batches of texts of similar lengths
held_out_text      perplexity, agreement with the teacher, and alignment with sense embeddings
continued_texts    how each model continues a few held-out texts
card_sections      what model cards show of each evaluation
results_in_cards   adds results to the model cards of exports
tasks              the paper's benchmarks: runs each model on the questions
task_questions     reads and checks the questions
task_scoring       scores the answers
lexical/           knowledge of words and senses
"""
