"""Lexical knowledge of language models, measured on text that is in no training text of the config.

| measure | module | an item | chance |
|---|---|---|---|
| sense_separation, …_target | `separation` | a lemma: ROC AUC of same-sense against other-sense pairs | .5 |
| sense_retrieval, …_target | `retrieval` | an example: its sense comes first among those of its lemma | 1/C |
| sense_retrieval_rank, …_target | `retrieval` | the same: one by the rank of its sense | mean of 1/1 … 1/C |
| synonym_preference | `preference` | an example with a word replaced by a synonym or an antonym | .5 |
| row_agreement | `alignment` | a held-out position: the teacher's nearest sense row is the model's too | 1/C |
| wic_accuracy, wic_auc | `wic` | a pair of sentences of a file of Words in Context | share of the larger class, .5 |
| sense_alignment | `alignment` | a held-out position: a row of P_i is nearer than all of N_i | P/(P + N) |
| lexical_perplexity | :mod:`dskd.evaluation.held_out_text` | a held-out position whose target has relations | V |

`contexts` finds words in WordNet's examples, `training_text` leaves out what was trained on, `items` makes the items
of them, `surface` says what letters alone give. `states` asks a model, `scores` has means, areas and their errors,
`results` keeps them, and `run` does it all. States are the model's last hidden states, after the final norm: where the
word ends, and (`…_target`) where the model is about to say it, which is where the sense loss works.
"""
