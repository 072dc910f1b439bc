"""The verb `dskd lexicon`: reads synonyms and antonyms."""

import argparse

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.reading import load_config

HELP = "read synonyms and antonyms, and write WORKDIR/lexicon/relations.parquet"
EPILOG = """examples:
  dskd lexicon --config configs/quickstart.yaml
  dskd lexicon --config FILE 'lexicon.tsv=[pairs.tsv]' lexicon.indirect_antonyms=true"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `lexicon`."""
    add_config_arguments(add_verb(verbs, "lexicon", run_lexicon, text=HELP, epilog=EPILOG))


def run_lexicon(args: argparse.Namespace) -> None:
    """Builds the lexicon."""
    from dskd.lexicon.build import build_lexicon

    build_lexicon(load_config(args.config, args.overrides))
