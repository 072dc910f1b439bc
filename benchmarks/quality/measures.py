"""Names of measures in the results, in addition to those of :mod:`dskd.evaluation.held_out_text`."""

HIDDEN = "hidden_distance"  # mean over positions of |h - t|² / D; h, t: last hidden states of student and teacher
LEXICAL = ("sense_separation_target", "sense_retrieval_target", "synonym_preference")  # from dskd.evaluation.lexical
GEOMETRY = "synonym_nearer"  # the teacher's share of pairs of a synonym and an antonym whose synonym is nearer
KNOWLEDGE = (*LEXICAL, "sense_alignment")  # the last one is from dskd.evaluation.held_out_text
ERROR, ITEMS = "{}_standard_error", "{}_items"  # for the teacher's measures; items are the number of words in a measure
ON_TEXT = ("perplexity", "accuracy", "lexical_perplexity", HIDDEN)
DIGITS = {"perplexity": 3, "accuracy": 4, "lexical_perplexity": 1, HIDDEN: 4} | dict.fromkeys((*KNOWLEDGE, GEOMETRY), 3)
