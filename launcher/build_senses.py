"""Gathers the teacher's states over the training text, clusters them, and writes WORKDIR/senses."""

from dskd.program import build_parser, run_on_ranks
from dskd.senses.build import build_senses

EPILOG = """
examples:
  deepspeed launcher/build_senses.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/build_senses.py --config configs/quickstart.yaml senses.k=5

Any number of ranks gives the same dictionary. `dskd lexicon` and launcher/pipeline.py make what it reads.
"""

if __name__ == "__main__":
    run_on_ranks(build_parser(__doc__, EPILOG).parse_intermixed_args(), build_senses)
