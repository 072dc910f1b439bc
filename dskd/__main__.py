"""The `dskd` command: everything that needs no launcher."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dskd.compare.command import add_compare_parser, run_comparison
from dskd.config import Config
from dskd.config_file import load_config
from dskd.inspection.command import add_inspect_parser, run_inspection
from dskd.plan.command import add_plan_parser, run_plan
from dskd.program import add_config_arguments, run, run_on_ranks
from dskd.senses.command import add_senses_parser, run_senses

CONFIG_HELP = "explain every key of a configuration file; with --config, check one and print all that it says"
PREFLIGHT_HELP = "check the nodes of a job before it: all-reduce, storage, clocks, versions, shards"
PREFLIGHT_EPILOG = """
examples:
  dskd preflight --config configs/quickstart.yaml                                    this machine, one rank
  deepspeed --hostfile hosts --module dskd preflight --config FILE                   the ranks that training will have
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


_VERBS: dict[str, tuple[Callable[[Config], None], str]] = {
    "lexicon": (_lexicon, "read synonyms and antonyms, and write WORKDIR/lexicon/relations.parquet"),
    "student": (_student, "cut the student from the teacher's safetensors, and write WORKDIR/student"),
    "export": (_export, "make WORKDIR/export/RUN, a Hugging Face model, from the newest checkpoint of a run"),
}


def _status(config: Config) -> int:
    from dskd.train import report_status

    return 0 if report_status(config) else UNFINISHED_EXIT_CODE


def _preflight(given: argparse.Namespace) -> NoReturn:
    from dskd.preflight import preflight

    run_on_ranks(given, preflight)


def _explain_config(path: Path | None, overrides: list[str]) -> None:
    if path is None:
        from dskd.config_file import describe

        print(describe())
    else:
        import yaml

        print(yaml.safe_dump(load_config(path, overrides).as_dict(), sort_keys=False), end="")


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
    config = verbs.add_parser("config", help=CONFIG_HELP, description=f"{CONFIG_HELP[0].upper()}{CONFIG_HELP[1:]}.")
    config.add_argument("--config", type=Path, metavar="FILE", help="YAML file of an experiment")
    config.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over it")
    wordnet = verbs.add_parser("wordnet", help="find WordNet, and say where it is")
    wordnet.add_argument("--path", help="a folder with WordNet's dictionary files, instead of looking for one")
    status = verbs.add_parser("status", help=STATUS_HELP, description=f"{STATUS_HELP[0].upper()}{STATUS_HELP[1:]}.")
    add_config_arguments(status)
    checks = verbs.add_parser(
        "preflight",
        help=PREFLIGHT_HELP,
        description=f"{PREFLIGHT_HELP[0].upper()}{PREFLIGHT_HELP[1:]}.",
        epilog=PREFLIGHT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(checks)
    # DeepSpeed's launcher puts it before the verb; ranks are read from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_compare_parser(verbs)
    add_inspect_parser(verbs)
    add_plan_parser(verbs)
    add_senses_parser(verbs)
    given, extra = parser.parse_known_args()
    if given.verb == "inspect":
        return run_inspection(given, extra, parser)
    if extra and hasattr(given, "overrides") and not any(argument.startswith("-") for argument in extra):
        given.overrides += extra  # they stand in more than one place on the line, where argparse takes the first only
    elif extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if given.verb == "compare":
        return run_comparison(given)
    if given.verb == "plan":
        return run_plan(given)
    if given.verb == "config":
        return run(lambda: _explain_config(given.config, given.overrides))
    if given.verb == "senses":
        return run_senses(given)
    if given.verb == "preflight":
        _preflight(given)
    if given.verb == "status":
        return run(lambda: _status(load_config(given.config, given.overrides)))
    if given.verb == "wordnet":
        return run(lambda: _find_wordnet(given.path))
    action, _ = _VERBS[given.verb]
    return run(lambda: action(load_config(given.config, given.overrides)))


if __name__ == "__main__":
    sys.exit(main())
