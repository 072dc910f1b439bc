"""The verb `dskd senses`: its arguments, and the calls of its actions on finished sense dictionaries."""

import argparse
from pathlib import Path

from dskd.cli.program import add_config_arguments, run
from dskd.config.reading import load_config

MERGE_HELP = "make one sense dictionary of several, built by one teacher on different corpora"
MERGE_EPILOG = """
The config says who the teacher is, where the lexicon lies (for the spans and relations), and how to cluster: senses.k,
senses.states_per_sense, senses.restarts. Name the result in senses.path, and annotate with it.

example:
  dskd senses merge --config configs/wiki.yaml --dictionary work/wiki/senses --dictionary work/tasks/senses \\
      --output work/merged
"""
GEOMETRY_HELP = "say whether the teacher has synonyms nearer than antonyms, which is what the sense loss gives on"
GEOMETRY_EPILOG = """
Of the words that have both, by the means of their sense embeddings. Near .5 in the first line there is hardly anything
to give on; the others say whether related words are near at all. It needs the sense dictionary only, and takes seconds.

example:
  dskd senses geometry --config configs/quickstart.yaml
"""


def add_senses_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parsers of `senses merge` and `senses geometry`."""
    senses = verbs.add_parser("senses", help="work on finished sense dictionaries: merge, geometry")
    actions = senses.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = _add_action(actions, "merge", MERGE_HELP, MERGE_EPILOG)
    merge.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the merged one goes")
    merge.add_argument(
        "--dictionary",
        type=Path,
        action="append",
        required=True,
        metavar="FOLDER",
        help="a folder with a senses.safetensors; give this two or more times",
    )
    _add_action(actions, "geometry", GEOMETRY_HELP, GEOMETRY_EPILOG)


def run_senses(given: argparse.Namespace) -> int:
    """Runs `senses` and returns its exit code."""
    return run(lambda: _act(given))


def _act(given: argparse.Namespace) -> None:
    config = load_config(given.config, given.overrides)
    if given.action == "merge":
        from dskd.senses.merge import merge_dictionaries

        merge_dictionaries(config, given.dictionary, given.output)
    else:
        from dskd.inspection.geometry import report_geometry

        report_geometry(config)


def _add_action(actions: argparse._SubParsersAction, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    return parser
