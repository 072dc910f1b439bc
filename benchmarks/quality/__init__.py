"""A study of whether senses help: variants ("arms") of one distillation, all tuned in the same way on one part of the
held-out text and tested on the other, with five seeds each. Start with `python -m benchmarks.quality --help`.
"""
