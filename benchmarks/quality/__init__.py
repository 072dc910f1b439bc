"""Whether senses help: arms of one distillation beside each other, tuned alike on one part of the held-out text and
tested on the other, five seeds each. `python -m benchmarks.quality --help` is the way in.
"""
