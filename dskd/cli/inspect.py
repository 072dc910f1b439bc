"""The verb `dskd inspect`: its arguments, and the calls of its actions."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dskd.cli.program import add_config_argument, run
from dskd.config import Config
from dskd.config.reading import load_config

HELP = "look at what was built: a word, the lexicon, the sense dictionary, a picture of senses"
EPILOG = """
Each of them shows what is there, and says with which command the rest is made. Nothing is changed.

examples:
  dskd inspect word happy --config configs/quickstart.yaml
  dskd inspect word "with child" --config configs/quickstart.yaml --neighbours 20 --contexts 0
  dskd inspect lexicon --config configs/quickstart.yaml
  dskd inspect senses --config configs/quickstart.yaml --plot
  dskd inspect plot large small --config configs/quickstart.yaml --method tsne
"""
WORD_DESCRIPTION = """
One word: its relations with their sources, its tokens, whether it is a usable head, and for each of its senses the
states behind it, the nearest other entries of the sense dictionary (L2), and example contexts from the training shards.
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
A picture of the senses of some words, their synonyms and their antonyms, in two dimensions. A point is a sense, and its
area shows the states behind it.
"""


def add_inspect_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `inspect` with its sub-verbs."""
    inspect = verbs.add_parser(
        "inspect",
        help=HELP,
        description=f"{HELP[0].upper()}{HELP[1:]}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = inspect.add_subparsers(dest="what", required=True, metavar="WHAT")
    word = what.add_parser("word", help="one word, in everything there is", description=WORD_DESCRIPTION)
    _add_arguments(word, "WORD", "one word; quote one with a space in it")
    word.add_argument("--neighbours", type=_count, default=8, metavar="N", help="nearest entries a sense [8]")
    word.add_argument("--contexts", type=_count, default=3, metavar="N", help="example contexts a sense [3]")
    word.add_argument(
        "--scan", type=_count, default=20_000, metavar="N", help="training samples searched for contexts [20000]"
    )
    lexicon = what.add_parser("lexicon", help="sources, coverage, what was dropped", description=LEXICON_DESCRIPTION)
    _add_arguments(lexicon)
    senses = what.add_parser("senses", help="histograms and coverage", description=SENSES_DESCRIPTION)
    _add_arguments(senses)
    senses.add_argument("--plot", action="store_true", help="draw the histograms too, to WORKDIR/plots/senses.png")
    plot = what.add_parser("plot", help="a picture of the senses of words", description=PLOT_DESCRIPTION)
    _add_arguments(plot, "WORD", "words, each one token to the teacher")
    plot.add_argument("--method", choices=("pca", "tsne"), default="pca", help="how to get to two dimensions [pca]")
    plot.add_argument(
        "--neighbours", type=_count, default=10, metavar="N", help="synonyms, and antonyms, a word; the frequent [10]"
    )
    plot.add_argument("--output", type=Path, metavar="FILE.png", help="default: WORKDIR/plots/senses-WORD….png")


def run_inspection(given: argparse.Namespace, extra: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Runs `inspect` and returns its exit code.

    `extra` are the arguments that argparse left over, since it takes only one group of positional arguments. So words
    and overrides can come in any order; an argument that contains "=" is an override.
    """
    texts = [*given.texts, *extra]
    words = [text for text in texts if "=" not in text]
    overrides = [text for text in texts if "=" in text]
    options = [text for text in words if text.startswith("-")]
    if options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    words = [text.strip() for text in words]
    if "" in words:
        parser.error("an empty text is no word")
    wanted = {"word": "exactly one WORD (quote one with a space in it)", "plot": "one WORD or more"}
    fits = {"word": len(words) == 1, "plot": len(words) >= 1}.get(given.what, not words)
    if not fits:
        needs = wanted.get(given.what, "no word, only overrides like senses.k=5")
        parser.error(f"inspect {given.what} takes {needs}; found {', '.join(words) or 'none'}")
    action = _ACTIONS[given.what]
    return run(lambda: action(load_config(given.config, overrides), words, given))


def _word(config: Config, words: Sequence[str], given: argparse.Namespace) -> None:
    from dskd.inspection.word import format_word, inspect_word

    print(
        format_word(
            inspect_word(config, words[0], neighbours=given.neighbours, contexts=given.contexts, scan=given.scan)
        )
    )


def _lexicon(config: Config, words: Sequence[str], given: argparse.Namespace) -> None:
    from dskd.inspection.lexicon import format_lexicon, inspect_lexicon

    print(format_lexicon(inspect_lexicon(config)))


def _senses(config: Config, words: Sequence[str], given: argparse.Namespace) -> None:
    from dskd.inspection.senses import format_senses, inspect_senses, plot_senses

    report = inspect_senses(config)
    print(format_senses(report))
    if given.plot:
        print(f"\nPicture: {plot_senses(config, report)}")


def _plot(config: Config, words: Sequence[str], given: argparse.Namespace) -> None:
    from dskd.inspection.plot import plot_words

    print(plot_words(config, words, method=given.method, neighbours=given.neighbours, output=given.output))


_ACTIONS: dict[str, Callable[[Config, Sequence[str], argparse.Namespace], None]] = {
    "word": _word,
    "lexicon": _lexicon,
    "senses": _senses,
    "plot": _plot,
}


def _add_arguments(parser: argparse.ArgumentParser, words: str | None = None, help_words: str = "") -> None:
    overrides = "section.key=value, laid over the file; `dskd config` explains every key"
    metavar, text = ("section.key=value", overrides) if words is None else (words, f"{help_words}; also {overrides}")
    add_config_argument(parser)
    parser.add_argument("texts", nargs="*", metavar=metavar, help=text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, found {text!r}")
    return int(text)
