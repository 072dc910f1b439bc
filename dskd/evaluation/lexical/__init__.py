"""Lexical knowledge of language models, measured on text that no training text of the config contains.

| measure | module | an item | chance |
|---|---|---|---|
| sense_separation, …_target | `separation` | a lemma: ROC AUC of same-sense against other-sense pairs | .5 |
| sense_retrieval, …_target | `retrieval` | an example: its sense comes first among those of its lemma | 1/C |
| sense_retrieval_rank, …_target | `retrieval` | an example: reciprocal rank of its sense | mean of 1/1 … 1/C |
| synonym_preference | `preference` | an example with a word replaced by a synonym or an antonym | .5 |
| row_agreement | `alignment` | a held-out position: model and teacher have the same nearest sense row | 1/C |
| wic_accuracy, wic_auc | `wic` | a pair of sentences from a file of Words in Context | share of the larger class, .5 |
| sense_alignment | `alignment` | a held-out position: a row of P_i is nearer than all of N_i | P/(P + N) |
| lexical_perplexity | :mod:`dskd.evaluation.held_out_text` | a held-out position whose target has relations | V |

`contexts` finds words in WordNet's examples, `training_text` recognises sentences of the training text, `items` makes
the items from the others, and `surface` computes what letters alone score. `states` reads a model's states and
likelihoods, `scores` computes means, areas and their errors, `results` saves them, and `run` calls them all. States are
the model's last hidden states, after the final norm: at the word's last token, and (`…_target`) at the token before
the word, where the model predicts it and where the sense loss applies.
"""
