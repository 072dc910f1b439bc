"""Does it help? Arms of one distillation beside each other: tuned alike on one half of the held-out text, tested on the
other, five seeds each. `python -m benchmarks.quality --help` is the way in.
"""
