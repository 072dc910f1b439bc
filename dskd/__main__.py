"""The `dskd` command: everything that needs no launcher."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from dskd.config import Config
from dskd.config_file import load_config
from dskd.inspection.command import add_inspect_parser, run_inspection
from dskd.program import add_config_arguments, run

MERGE_HELP = "make one sense dictionary of several, built by one teacher on different corpora"
MERGE_EPILOG = """
The config says who the teacher is, where the lexicon lies (for the spans and relations), and how to cluster: senses.k,
senses.states_per_sense, senses.restarts. Name the result in senses.path, and annotate with it.

example:
  dskd senses merge --config configs/wiki.yaml --dictionary work/wiki/senses --dictionary work/tasks/senses \\
      --output work/merged
"""
STATUS_HELP = "say how far a run is trained; exit code 0 when to its end, 3 when not"
UNFINISHED_EXIT_CODE = 3
DESCRIPTION = """
Decoder-based sense knowledge distillation. These verbs run in one process; the stages that run on several ranks are
started with DeepSpeed's launcher: `deepspeed launcher/{build_senses,annotate,train,evaluate}.py --config FILE`, or all
in order with `python launcher/pipeline.py --config FILE`.
"""


def _lexicon(config: Config) -> None:
    from dskd.lexicon.build import build_lexicon

    build_lexicon(config)


def _student(config: Config) -> None:
    from dskd.student import build_student

    build_student(config)


def _export(config: Config) -> None:
    from dskd.export import build_export

    build_export(config)


def _compare(config: Config) -> None:
    from dskd.compare import compare

    print(compare(config))


def _merge(config: Config, folders: list[Path], output: Path) -> None:
    from dskd.senses.merge import merge_dictionaries

    merge_dictionaries(config, folders, output)


_VERBS: dict[str, tuple[Callable[[Config], None], str]] = {
    "lexicon": (_lexicon, "read synonyms and antonyms, and write WORKDIR/lexicon/relations.parquet"),
    "student": (_student, "cut the student from the teacher's safetensors, and write WORKDIR/student"),
    "export": (_export, "make WORKDIR/export/RUN, a Hugging Face model, from the newest checkpoint of a run"),
    "compare": (_compare, "print runs and their measures side by side, and draw the loss curves"),
}


def _status(config: Config) -> int:
    from dskd.train import report_status

    return 0 if report_status(config) else UNFINISHED_EXIT_CODE


def _explain_config() -> None:
    from dskd.config_file import describe

    print(describe())


def _find_wordnet(path: str | None) -> None:
    from dskd.wordnet import open_wordnet

    print(f"WordNet: {open_wordnet(path).folder}")


def main() -> int:
    """Parses the verb and runs it."""
    parser = argparse.ArgumentParser(
        prog="dskd", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (_, text) in _VERBS.items():
        add_config_arguments(verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."))
    verbs.add_parser("config", help="explain every key of a configuration file, with its default")
    wordnet = verbs.add_parser("wordnet", help="find WordNet, and say where it is")
    wordnet.add_argument("--path", help="a folder with WordNet's dictionary files, instead of looking for one")
    senses = verbs.add_parser("senses", help="work on finished sense dictionaries: merge")
    merge = senses.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "merge",
        help=MERGE_HELP,
        description=f"{MERGE_HELP[0].upper()}{MERGE_HELP[1:]}.",
        epilog=MERGE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the merged one goes")
    merge.add_argument(
        "--dictionary",
        type=Path,
        action="append",
        required=True,
        metavar="FOLDER",
        help="a folder with a senses.safetensors; give this two or more times",
    )
    add_config_arguments(merge)
    status = verbs.add_parser("status", help=STATUS_HELP, description=f"{STATUS_HELP[0].upper()}{STATUS_HELP[1:]}.")
    add_config_arguments(status)
    add_inspect_parser(verbs)
    given, extra = parser.parse_known_args()
    if given.verb == "inspect":
        return run_inspection(given, extra, parser)
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if given.verb == "config":
        return run(_explain_config)
    if given.verb == "senses":
        return run(lambda: _merge(load_config(given.config, given.overrides), given.dictionary, given.output))
    if given.verb == "status":
        return run(lambda: _status(load_config(given.config, given.overrides)))
    if given.verb == "wordnet":
        return run(lambda: _find_wordnet(given.path))
    action, _ = _VERBS[given.verb]
    return run(lambda: action(load_config(given.config, given.overrides)))


if __name__ == "__main__":
    sys.exit(main())
