"""The verb `dskd senses`: measures and merges finished sense dictionaries."""

import argparse
from pathlib import Path

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.reading import load_config

HELP = "work on finished sense dictionaries: merge, geometry"
EPILOG = """
examples:
  dskd senses geometry --config configs/quickstart.yaml
  dskd senses merge --config FILE --dictionary work/wiki/senses --dictionary work/tasks/senses --output work/merged
"""
MERGE_HELP = "merge sense dictionaries built from one teacher on different corpora"
MERGE_EPILOG = """
The config names the teacher, the lexicon (for the spans and relations), and how to cluster: senses.k,
senses.states_per_sense, senses.restarts. Name the result in senses.path, and annotate with it.

example:
  dskd senses merge --config FILE --dictionary work/wiki/senses --dictionary work/tasks/senses --output work/merged
"""
GEOMETRY_HELP = (
    "measure whether, in the teacher's states, words are nearer to synonyms than to antonyms, as the sense loss assumes"
)
GEOMETRY_EPILOG = """
Compares the mean sense embeddings of the words that have both. If the first line is near .5, there is hardly anything
to pass on; the others show whether related words are near each other at all. It needs only the sense dictionary, and
takes seconds.

example:
  dskd senses geometry --config configs/quickstart.yaml
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parsers of `senses merge` and `senses geometry`."""
    senses = add_verb(verbs, "senses", run_geometry, text=HELP, epilog=EPILOG)
    actions = senses.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = add_verb(actions, "merge", run_merge, text=MERGE_HELP, epilog=MERGE_EPILOG)
    add_config_arguments(merge)
    merge.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the merged dictionary")
    merge.add_argument(
        "--dictionary",
        type=Path,
        action="append",
        required=True,
        metavar="FOLDER",
        help="a folder with a senses.safetensors; give this two or more times",
    )
    geometry = add_verb(actions, "geometry", run_geometry, text=GEOMETRY_HELP, epilog=GEOMETRY_EPILOG)
    add_config_arguments(geometry)


def run_merge(args: argparse.Namespace) -> None:
    """Merges the dictionaries."""
    from dskd.senses.merge import merge_dictionaries

    merge_dictionaries(load_config(args.config, args.overrides), args.dictionary, args.output)


def run_geometry(args: argparse.Namespace) -> None:
    """Prints the geometry of the sense dictionary."""
    from dskd.inspection.geometry import report_geometry

    report_geometry(load_config(args.config, args.overrides))
