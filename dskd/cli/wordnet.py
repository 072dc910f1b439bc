"""The verb `dskd wordnet`: finds WordNet on this machine."""

import argparse

from dskd.cli.program import add_verb

HELP = "find WordNet, and print its folder"
EPILOG = """
examples:
  dskd wordnet                                                                       where it is, or how to get it
  dskd wordnet --path /shared/wordnet/dict                                           whether it is there
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `wordnet`."""
    parser = add_verb(verbs, "wordnet", run_wordnet, text=HELP, epilog=EPILOG)
    parser.add_argument("--path", help="a folder with WordNet's dictionary files, instead of looking for one")


def run_wordnet(args: argparse.Namespace) -> None:
    """Prints the folder of WordNet."""
    from dskd.lexicon.wordnet import open_wordnet

    print(f"WordNet: {open_wordnet(args.path).folder}")
