"""The verb `dskd inspect`: shows what was built."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dskd.cli.program import add_config_arguments, add_verb, split_overrides, whole_number
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.errors import UserError

HELP = "look at what was built: a word, the lexicon, the sense dictionary, a picture of senses, the shards"
EPILOG = """
Each of them shows what is there, names the command that makes what is missing, and changes nothing.

examples:
  dskd inspect word happy --config configs/quickstart.yaml
  dskd inspect word "with child" --config configs/quickstart.yaml --neighbours 20 --contexts 0
  dskd inspect lexicon --config configs/quickstart.yaml
  dskd inspect senses --config configs/quickstart.yaml --plot
  dskd inspect plot large small --config configs/quickstart.yaml --method tsne
  dskd inspect shards --config configs/quickstart.yaml
"""
WORD_DESCRIPTION = """
One word: its relations with their sources, its tokens, whether it is a usable head, and for each of its senses the
number of its states, the nearest other entries of the sense dictionary (L2), and contexts from the training shards. A
usable head is a single token of three letters or more that has a synonym or an antonym in the sense dictionary.
"""
LEXICON_DESCRIPTION = """
The lexicon: pairs by source, the pairs dropped and why, how many of the vocabulary's words it covers, and the pairs
that the teacher's tokenizer cannot express.
"""
SENSES_DESCRIPTION = """
The sense dictionary: histograms of states and of senses per token, the share of training targets that have senses,
synonyms and antonyms, and the most frequent tokens without a sense.
"""
PLOT_DESCRIPTION = """
A picture of the senses of some words, their synonyms and their antonyms, in two dimensions. Each point is a sense; its
area grows with the number of its states.
"""
SHARDS_DESCRIPTION = """
The shards: reads all of them, and compares every file with its manifest. If the index has a hash of each sample (for
shards with stored states it has), the changed samples are named. Training compares each of these when it reads it.
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `inspect` with its sub-verbs."""
    inspect = add_verb(verbs, "inspect", run_inspect, text=HELP, epilog=EPILOG)
    what = inspect.add_subparsers(dest="what", required=True, metavar="WHAT")
    word = what.add_parser("word", help="everything about one word", description=WORD_DESCRIPTION)
    _add_arguments(word, "WORD", "the word, in quotes if it contains a space; overrides may follow; ")
    word.add_argument(
        "--neighbours", type=whole_number(0), default=8, metavar="N", help="nearest entries of each sense [8]"
    )
    word.add_argument(
        "--contexts", type=whole_number(0), default=3, metavar="N", help="example contexts of each sense [3]"
    )
    word.add_argument(
        "--scan",
        type=whole_number(0),
        default=20_000,
        metavar="N",
        help="training samples searched for contexts [20000]",
    )
    lexicon = what.add_parser("lexicon", help="sources, coverage, what was dropped", description=LEXICON_DESCRIPTION)
    _add_arguments(lexicon, "section.key=value")
    senses = what.add_parser("senses", help="histograms and coverage", description=SENSES_DESCRIPTION)
    _add_arguments(senses, "section.key=value")
    senses.add_argument("--plot", action="store_true", help="draw the histograms too, to WORKDIR/plots/senses.png")
    plot = what.add_parser("plot", help="a picture of the senses of words", description=PLOT_DESCRIPTION)
    _add_arguments(plot, "WORD", "words, each of which is one token of the teacher; also ")
    plot.add_argument("--method", choices=("pca", "tsne"), default="pca", help="projection to two dimensions [pca]")
    plot.add_argument(
        "--neighbours",
        type=whole_number(0),
        default=10,
        metavar="N",
        help="most frequent synonyms, and antonyms, of each word [10]",
    )
    plot.add_argument("--output", type=Path, metavar="FILE.png", help="default: WORKDIR/plots/senses-WORD….png")
    shards = what.add_parser("shards", help="compare all shards with their hashes", description=SHARDS_DESCRIPTION)
    _add_arguments(shards, "section.key=value")


def run_inspect(args: argparse.Namespace) -> None:
    """Prints the report that the sub-verb names; its words and overrides may be mixed on the command line."""
    overrides, others = split_overrides(args.overrides)
    words = [text.strip() for text in others]
    if "" in words:
        raise UserError("inspect: an empty text is not a word")
    if args.what == "word" and len(words) != 1:
        needs = "exactly one WORD (quote one with a space in it)"
    elif args.what == "plot" and not words:
        needs = "one WORD or more"
    elif args.what not in ("word", "plot") and words:
        needs = "no word, only overrides like senses.k=5"
    else:
        print(_report(args, load_config(args.config, overrides), words))
        return
    raise UserError(f"inspect {args.what} takes {needs}; found {', '.join(words) or 'none'}")


def _report(args: argparse.Namespace, config: Config, words: Sequence[str]) -> str:
    if args.what == "word":
        from dskd.inspection.word import format_word, inspect_word

        (word,) = words
        report = inspect_word(config, word, neighbours=args.neighbours, contexts=args.contexts, scan=args.scan)
        return format_word(report)
    if args.what == "lexicon":
        from dskd.inspection.lexicon import format_lexicon, inspect_lexicon

        return format_lexicon(inspect_lexicon(config))
    if args.what == "senses":
        from dskd.inspection.senses import report_senses

        return report_senses(config, with_picture=args.plot)
    if args.what == "shards":
        from dskd.inspection.shards import format_shards, inspect_shards

        return format_shards(inspect_shards(config))
    from dskd.inspection.plot import plot_words

    return plot_words(config, words, method=args.method, neighbours=args.neighbours, output=args.output)


def _add_arguments(parser: argparse.ArgumentParser, metavar: str, words: str = "") -> None:
    """Adds `--config FILE`, and the words and overrides, which may be mixed: what contains `=` is an override."""
    text = f"{words}overrides of the file; `dskd config` explains every key"
    add_config_arguments(parser, metavar=metavar, text=text)
