"""The verb `dskd smollm2`: fetches the teacher of configs/quickstart.yaml."""

import argparse
from pathlib import Path

from dskd.cli.program import add_verb
from dskd.models.files.smollm2 import NAME, PLACE, fetch

HELP = "fetch SmolLM2-135M-Instruct, the teacher of configs/quickstart.yaml: 98 MB"
EPILOG = f"""
examples:
  dskd smollm2                                                                       to {PLACE}
  dskd smollm2 --to /shared/models/{NAME}

A file that is complete is not fetched again, so the second call needs no network.
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `smollm2`."""
    parser = add_verb(verbs, "smollm2", run_smollm2, text=HELP, epilog=EPILOG)
    parser.add_argument("--to", type=Path, default=PLACE, metavar="FILE", help=f"the file to write; default: {PLACE}")


def run_smollm2(args: argparse.Namespace) -> None:
    """Fetches the file unless a complete one is there, and prints its path."""
    fetch(args.to)
