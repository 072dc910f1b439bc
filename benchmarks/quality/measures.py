"""The names of what is measured, as they stand in the results; those of :mod:`dskd.evaluation.held_out_text` beside."""

HIDDEN = "hidden_distance"  # mean over positions of |h - t|² / D, h the student's and t the teacher's last hidden state
LEXICAL = ("sense_separation_target", "sense_retrieval_target", "synonym_preference")  # of dskd.evaluation.lexical
GEOMETRY = "synonym_nearer"  # of the teacher: of its pairs of a synonym and an antonym, in how many the first is nearer
KNOWLEDGE = (*LEXICAL, "sense_alignment")  # the last is of the held-out text (dskd.evaluation.held_out_text)
ERROR, ITEMS = "{}_standard_error", "{}_items"  # of the teacher's: over the words that a measure is made of
ON_TEXT = ("perplexity", "accuracy", "lexical_perplexity", HIDDEN)
DIGITS = {"perplexity": 3, "accuracy": 4, "lexical_perplexity": 1, HIDDEN: 4} | dict.fromkeys((*KNOWLEDGE, GEOMETRY), 3)
