"""The verb `dskd status`: prints the progress of a run."""

import argparse

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.reading import load_config
from dskd.errors import UNFINISHED_EXIT_CODE

HELP = "print the progress of a run; exit code 0 if it is finished, 3 if not"
EPILOG = """
examples:
  dskd status --config configs/quickstart.yaml                                       of the run that `run` chooses
  dskd status --config FILE run=kd || deepspeed launcher/train.py --config FILE --resume run=kd
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `status`."""
    add_config_arguments(add_verb(verbs, "status", run_status, text=HELP, epilog=EPILOG))


def run_status(args: argparse.Namespace) -> int:
    """Prints the step of the newest checkpoint and returns the exit code."""
    from dskd.training.status import report_status

    return 0 if report_status(load_config(args.config, args.overrides)) else UNFINISHED_EXIT_CODE
