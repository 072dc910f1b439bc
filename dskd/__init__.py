"""Decoder-based sense knowledge distillation (DSKD), distributed.

A frozen decoder (the teacher) is distilled into a smaller one (the student). In addition to cross-entropy and KL, a
sense loss pulls the student's last hidden state towards the sense embeddings of the target word and of its synonyms,
and away from those of its antonyms (arXiv 2602.22351). The stages, in the order in which data flows through them:

    lexicon, corpus -> sequences -> student, senses -> shards -> train -> export -> evaluation -> compare
"""

__version__ = "0.1.0"
