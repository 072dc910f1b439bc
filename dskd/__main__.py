"""The `dskd` command, with all verbs that need no launcher."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dskd import __version__
from dskd.cli.compare import add_compare_parser, run_comparison
from dskd.cli.inspect import add_inspect_parser, run_inspection
from dskd.cli.plan import add_plan_parser, run_plan
from dskd.cli.program import add_config_arguments, run, run_on_ranks
from dskd.cli.senses import add_senses_parser, run_senses
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.console import allow_any_text
from dskd.distributed.world import leave_launcher

CONFIG_HELP = "explain every key of a configuration file; with --config, check one and print all that it says"
PREFLIGHT_HELP = "check the nodes of a job before it: all-reduce, storage, clocks, versions, shards"
PREFLIGHT_EPILOG = """
examples:
  dskd preflight --config configs/quickstart.yaml                                    this machine, one rank
  deepspeed --hostfile hosts --module dskd preflight --config FILE                   the ranks that training will have
"""
CONFIG_EPILOG = """
examples:
  dskd config                                                                        every key
  dskd config | grep train                                                           some of them
  dskd config --config configs/quickstart.yaml loss.margin=2                         check a file and an override
  dskd config --config configs/quickstart.yaml --run-names                           the runs that it describes
"""
STATUS_EPILOG = """
examples:
  dskd status --config configs/quickstart.yaml                                       of the run that `run` chooses
  dskd status --config FILE run=kd || deepspeed launcher/train.py --config FILE --resume run=kd
"""
WORDNET_EPILOG = """
examples:
  dskd wordnet                                                                       where it is, or how to get it
  dskd wordnet --path /shared/wordnet/dict                                           whether it is there
"""
# Stages that a user may expect among the verbs, with the commands that start them.
_ON_RANKS = {
    "train": "training is `deepspeed launcher/train.py --config FILE`",
    "annotate": "annotation is `deepspeed launcher/annotate.py --config FILE`",
    "evaluate": "evaluation is `deepspeed launcher/evaluate.py --config FILE`",
    "build_senses": "building the sense dictionary is `deepspeed launcher/build_senses.py --config FILE`",
    "pipeline": "the pipeline is `python launcher/pipeline.py --config FILE`",
}
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
    from dskd.models.cutting import build_student

    build_student(config)


def _export(config: Config) -> None:
    from dskd.training.export import build_export

    build_export(config)


_VERBS: dict[str, tuple[Callable[[Config], None], str, str]] = {
    "lexicon": (
        _lexicon,
        "read synonyms and antonyms, and write WORKDIR/lexicon/relations.parquet",
        "dskd lexicon --config FILE 'lexicon.tsv=[pairs.tsv]' lexicon.indirect_antonyms=true",
    ),
    "student": (
        _student,
        "cut the student from the teacher's safetensors, and write WORKDIR/student",
        "dskd student --config FILE 'student.layers=[0, 2, 4]' student.train_layers=1",
    ),
    "export": (
        _export,
        "make WORKDIR/export/RUN, a Hugging Face model, from the newest checkpoint of a run",
        "dskd export --config FILE run=kd",
    ),
}


def _status(config: Config) -> int:
    from dskd.training.records import report_status

    return 0 if report_status(config) else UNFINISHED_EXIT_CODE


def _preflight(given: argparse.Namespace) -> NoReturn:
    from dskd.plan.preflight import preflight

    run_on_ranks(given, preflight)


def _explain_config(path: Path | None, overrides: list[str], *, run_names: bool) -> None:
    if path is not None and run_names:
        print("\n".join(load_config(path, overrides).run_names))
    elif path is None:
        from dskd.config.messages import describe

        print(describe())
    else:
        import yaml

        print(yaml.safe_dump(load_config(path, overrides).as_dict(), sort_keys=False), end="")


def _find_wordnet(path: str | None) -> None:
    from dskd.lexicon.wordnet import open_wordnet

    print(f"WordNet: {open_wordnet(path).folder}")


def _add_verb(verbs: argparse._SubParsersAction, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main() -> int:
    """Parses the command line, runs the verb, and returns its exit code."""
    allow_any_text()
    parser = argparse.ArgumentParser(
        prog="dskd", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dskd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (_, text, example) in _VERBS.items():
        examples = f"examples:\n  dskd {name} --config configs/quickstart.yaml\n  {example}"
        add_config_arguments(_add_verb(verbs, name, text, examples))
    config = _add_verb(verbs, "config", CONFIG_HELP, CONFIG_EPILOG)
    config.add_argument("--config", type=Path, metavar="FILE", help="YAML file of an experiment")
    config.add_argument(
        "--run-names", action="store_true", help="with --config: print the names of its runs, one a line"
    )
    config.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over it")
    wordnet = _add_verb(verbs, "wordnet", "find WordNet, and say where it is", WORDNET_EPILOG)
    wordnet.add_argument("--path", help="a folder with WordNet's dictionary files, instead of looking for one")
    add_config_arguments(_add_verb(verbs, "status", STATUS_HELP, STATUS_EPILOG))
    add_config_arguments(_add_verb(verbs, "preflight", PREFLIGHT_HELP, PREFLIGHT_EPILOG))
    # DeepSpeed's launcher puts this option before the verb. It is ignored: ranks are read from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_compare_parser(verbs)
    add_inspect_parser(verbs)
    add_plan_parser(verbs)
    add_senses_parser(verbs)
    if (verb := next((word for word in sys.argv[1:] if not word.startswith("-")), "")) in _ON_RANKS:
        parser.error(f"{verb!r} is no verb, for it runs on several ranks: {_ON_RANKS[verb]}")
    given, extra = parser.parse_known_args()
    if given.verb != "preflight":
        leave_launcher()
    if given.verb == "inspect":
        return run_inspection(given, extra, parser)
    if extra and hasattr(given, "overrides") and not any(argument.startswith("-") for argument in extra):
        given.overrides += extra  # argparse takes only the first group of overrides if the line has several
    elif extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if given.verb == "compare":
        return run_comparison(given)
    if given.verb == "plan":
        return run_plan(given)
    if given.verb == "config":
        if given.config is None and (given.overrides or given.run_names):
            what = given.overrides[0] if given.overrides else "--run-names"
            parser.error(f"{what} is of a config file, and there is none: add --config FILE")
        return run(lambda: _explain_config(given.config, given.overrides, run_names=given.run_names))
    if given.verb == "senses":
        return run_senses(given)
    if given.verb == "preflight":
        _preflight(given)
    if given.verb == "status":
        return run(lambda: _status(load_config(given.config, given.overrides)))
    if given.verb == "wordnet":
        return run(lambda: _find_wordnet(given.path))
    action, *_ = _VERBS[given.verb]
    return run(lambda: action(load_config(given.config, given.overrides)))


if __name__ == "__main__":
    sys.exit(main())
