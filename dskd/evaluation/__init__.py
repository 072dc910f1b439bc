"""Evaluations of the teacher, the untrained student and trained runs.

held_out_text, continued_texts
                    perplexity, agreement with the teacher, and how a model continues a text
tasks, task_questions, task_scoring
                    the paper's benchmarks
lexical/            knowledge of words and senses
suite               the steps that all of them share; a new evaluation is one module that uses it
models              the models that are evaluated
scores_by_example   the file of each example's scores
batching            batches of texts of similar lengths
"""
