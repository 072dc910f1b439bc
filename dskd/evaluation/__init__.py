"""Evaluations of the teacher, the untrained student and trained runs.

programs           runs them: their options, functions, and stages of the pipeline
evaluations        the table: a row for each, with its kind, its titles, and its section of model cards
suite              the steps that all evaluations share
models             the models that are evaluated
scores_by_example  the file of each example's scores
batching           batches of texts of similar lengths
held_out_text      perplexity, agreement with the teacher, and alignment with sense embeddings
continued_texts    how each model continues a few held-out texts
card_sections      the form of what model cards show of an evaluation
results_in_cards   adds results to the model cards of exports
tasks              the paper's benchmarks: runs each model on the questions
task_questions     reads and checks the questions
task_scoring       scores the answers
lexical/           knowledge of words and senses
"""
