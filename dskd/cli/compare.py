"""The verb `dskd compare`: compares runs."""

import argparse
from pathlib import Path

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.evaluation.evaluations import EVALUATIONS

HELP = "compare runs: settings, measures with intervals and tests, speed, cost; --html writes a report"
DESCRIPTION = """
Runs side by side: the settings that differ, what they score on held-out text, words and benchmarks, final and best
metrics, speed, cost, and coverage. Runs that differ in nothing but their seed are one group, shown as mean ± 95 %
interval; groups are tested against the baseline (the first group, unless --baseline names one) on the results of each
example, and over seeds where there are two or more. Runs that were evaluated on different data are refused (exit code
2).

Without --experiment, --run or --tag, it compares the newest run of each name in the config's experiment. If several of
these options are given, a run has to match all of them; if --experiment or --run is repeated, one of its values.
"""
EPILOG = """
examples:
  dskd compare --config configs/quickstart.yaml                                   the newest run of each name
  dskd compare --config FILE --run kd --run dskd --html report.html               these runs, and a report in one file
  dskd compare --config FILE --run 0a1b2c3d4e5f60718293a4b5c6d7e8f9 --run dskd    one by its id in MLflow
  dskd compare --config FILE --experiment kd --experiment dskd                    all settings of two experiments
  dskd compare --config FILE --texts                                              and what the models say
  dskd compare --config FILE --tag evaluation_data=HASH --baseline kd             what was evaluated on this data
  dskd compare --config FILE --without lexical                                    without some results
  dskd compare --config FILE --without-measures                                   settings, speed and cost only

Runs of several seeds are trained, exported and evaluated by one command, below one parent in MLflow:
  python launcher/pipeline.py --config FILE 'seeds=[0, 1, 2]' tracking.parent=seeds
  dskd compare --config FILE 'seeds=[0, 1, 2]'
One of them by itself: deepspeed launcher/train.py --config FILE 'seeds=[0, 1, 2]' run=dskd-s1
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `compare`."""
    parser = add_verb(verbs, "compare", run_compare, text=HELP, description=DESCRIPTION, epilog=EPILOG)
    add_config_arguments(parser)
    parser.add_argument(
        "--experiment",
        action="append",
        default=[],
        metavar="NAME",
        help="an experiment in MLflow; may be repeated [tracking.experiment]",
    )
    parser.add_argument("--run", action="append", default=[], metavar="NAME_OR_ID", help="a run; may be repeated")
    parser.add_argument(
        "--tag",
        action="append",
        default=[],
        type=_tag,
        metavar="KEY=VALUE",
        help="a tag that runs must have; may be repeated",
    )
    parser.add_argument("--baseline", metavar="GROUP", help="the group that the others are tested against [the first]")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a report: one file, which needs no network"
    )
    parser.add_argument("--texts", action="store_true", help="also print how each model continues the same few prompts")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=list(EVALUATIONS),
        metavar="EVALUATION",
        help="leave out results: evaluation (the held-out text), lexical, or a benchmark such as piqa; may be repeated",
    )
    parser.add_argument(
        "--without-measures", action="store_true", help="leave out everything that depends on the evaluation data"
    )


def run_compare(args: argparse.Namespace) -> None:
    """Prints the comparison, and writes it as HTML if the arguments name a file."""
    from dskd.compare.choosing import Selection
    from dskd.compare.comparison import make_comparison
    from dskd.compare.report import require_writable, write_report
    from dskd.compare.text import summarize

    config = load_config(args.config, args.overrides)
    tags: dict[str, str] = {}
    for key, value in args.tag:
        if tags.setdefault(key, value) != value:
            raise UserError(
                f"--tag {key}={value} contradicts --tag {key}={tags[key]}; a run has one value for each tag"
            )
    if args.html is not None:
        require_writable(args.html)
    without = list(EVALUATIONS) if args.without_measures else args.without
    selection = Selection(args.experiment, args.run, tags)
    comparison = make_comparison(config, selection, baseline=args.baseline, without=without)
    print(summarize(comparison, with_texts=args.texts))
    if args.html is not None:
        write_report(comparison, args.html)
        print(f"Report: {args.html}")


def _tag(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as device=cuda, found {text!r}")
    return key, value
