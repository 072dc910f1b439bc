"""The verb `dskd export`: makes a Hugging Face model from a checkpoint."""

import argparse

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.reading import load_config

HELP = "make WORKDIR/export/RUN, a Hugging Face model, from the newest checkpoint of a run"
EPILOG = """examples:
  dskd export --config configs/quickstart.yaml
  dskd export --config FILE run=kd"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `export`."""
    add_config_arguments(add_verb(verbs, "export", run_export, text=HELP, epilog=EPILOG))


def run_export(args: argparse.Namespace) -> None:
    """Exports the newest checkpoint of the config's run; adds to its model card the results that exist already."""
    from dskd.evaluation.results_in_cards import update_cards
    from dskd.training.exporting.export import build_export

    config = load_config(args.config, args.overrides)
    build_export(config)
    update_cards(config)
