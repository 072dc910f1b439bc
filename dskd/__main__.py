"""The `dskd` command: the table of its verbs. Each verb is a module of `dskd.cli`."""

import argparse
import sys

from dskd import __version__
from dskd.cli import (
    compare,
    config,
    export,
    inspect,
    lexicon,
    plan,
    preflight,
    senses,
    smollm2,
    status,
    student,
    wordnet,
)
from dskd.cli.program import parse, run
from dskd.console import allow_any_text
from dskd.distributed.world import leave_launcher

VERBS = (lexicon, student, export, config, wordnet, smollm2, status, preflight, compare, inspect, plan, senses)
ACTIONS = {"inspect": "WHAT", "senses": "ACTION"}  # verbs with verbs of their own, and what their help calls these
# The programs of launcher/, which users may try as verbs.
RANK_PROGRAMS = ("write_texts", "build_senses", "annotate", "train", "evaluate")
PROGRAMS = (*RANK_PROGRAMS, "pipeline")
DESCRIPTION = f"""
Decoder-based sense knowledge distillation. All verbs but preflight run in one process; the stages that run on several
ranks are started with DeepSpeed's launcher: `deepspeed launcher/{{{",".join(RANK_PROGRAMS)}}}.py
--config FILE`, or all in order with `python launcher/pipeline.py --config FILE`.
"""


def main() -> int:
    """Parses the command line, runs the verb, and returns its exit code."""
    allow_any_text()
    parser = argparse.ArgumentParser(
        prog="dskd", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dskd {__version__}")
    # DeepSpeed's launcher puts this option before the verb. It is ignored: ranks are read from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    form, words = "VERB", [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if words and words[0] in ACTIONS:
        form = f"{words[0]} {ACTIONS[words.pop(0)]}"
    first = words[0] if words else ""
    if first.partition("=")[0] == "--config" or ("=" in first and not first.startswith("-")):
        parser.error(f"put --config and overrides after the verb: `dskd {form} --config FILE section.key=value`")
    if (name := next((word for word in sys.argv[1:] if not word.startswith("-")), "")) in PROGRAMS:
        launcher = "python" if name == "pipeline" else "deepspeed"
        parser.error(f"{name!r} is not a verb of dskd; start it with `{launcher} launcher/{name}.py --config FILE`")
    args = parse(parser)
    if args.verb != "preflight":
        leave_launcher()
    return run(lambda: args.run_verb(args))


if __name__ == "__main__":
    sys.exit(main())
