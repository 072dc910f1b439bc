"""The verb `dskd preflight`: checks the nodes of a job. It is the only verb that runs on all ranks."""

import argparse
from typing import NoReturn

from dskd.cli.program import add_config_arguments, add_verb, run_on_ranks

HELP = "check the nodes before a job: all-reduce, storage, clocks, versions, shards"
EPILOG = """
examples:
  dskd preflight --config configs/quickstart.yaml                                    this machine, one rank
  deepspeed --hostfile hosts --module dskd preflight --config FILE                   the ranks that training will have
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `preflight`."""
    add_config_arguments(add_verb(verbs, "preflight", run_preflight, text=HELP, epilog=EPILOG))


def run_preflight(args: argparse.Namespace) -> NoReturn:
    """Joins the ranks, checks their nodes, and exits."""
    from dskd.plan.preflight import preflight

    run_on_ranks(args, preflight)
