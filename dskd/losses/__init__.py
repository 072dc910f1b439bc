"""The loss (docs/method.md, section 4): its terms as sums over positions, which the training step divides once.

terms               the sums of the head and their names, from the table of the terms (`config/loss_terms.py`)
head                the output matrix and all terms, chunk by chunk; `models.structure.output_head` scales and caps
logits              cross-entropy, divergence from the teacher, distance of hidden states
sense_distance      the sense loss as distances
sense_distribution  the sense loss as a divergence of distributions
"""
