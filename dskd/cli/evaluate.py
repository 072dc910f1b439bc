"""The program `launcher/evaluate.py`: its options, which exclude each other, and what it does before and after it
measures.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dskd.cli.program import build_parser, parse, run_on_ranks
from dskd.config import Config
from dskd.distributed.world import World
from dskd.evaluation.programs import PROGRAMS, Arguments, Program


def run_evaluate(description: str | None, epilog: str) -> NoReturn:
    """Reads the command line, evaluates on all ranks, and exits.

    `description` and `epilog` are for the help. An impossible command line ends with exit code 2 before work begins.
    """
    without_option, *optional = PROGRAMS
    parser = _build_parser(description, epilog, optional)
    args = parse(parser, "models", *(program.option for program in optional))
    program = next((each for each in optional if getattr(args, each.option) is not None), without_option)
    arguments = Arguments(getattr(args, program.option, ()), args.models, args.force)
    _require_known_names(parser, program, arguments.names)
    if args.models == []:
        parser.error("argument --models: expected at least one name, found only overrides")
    if args.models and program is without_option:
        parser.error(f"--models needs {_options(optional)}; on held-out text, all models are evaluated")
    run_is_named = any(override.startswith("run=") for override in args.overrides)

    def evaluate(config: Config, world: World) -> None:
        # Imported here so that --help does not wait for torch.
        from dskd.distributed.collectives import on_main
        from dskd.evaluation.models import require_exports
        from dskd.evaluation.results_in_cards import update_cards

        if not args.models:
            on_main(lambda: require_exports(config, run_is_named=run_is_named))
        program.run(config, world, arguments)
        on_main(lambda: update_cards(config))

    run_on_ranks(args, evaluate)


def _build_parser(description: str | None, epilog: str, optional: Sequence[Program]) -> argparse.ArgumentParser:
    """Builds the parser with an option for each of the `optional` programs, of which a command line takes one."""
    parser = build_parser(description, epilog)
    parser.add_argument("--force", action="store_true", help="evaluate again, even what is up to date")
    instead = parser.add_mutually_exclusive_group()
    for program in optional:
        form = {"nargs": "*", "metavar": "NAME"} if program.takes else {"action": "store_const", "const": []}
        instead.add_argument(f"--{program.option}", help=program.help, **form)
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"with {_options(optional)}: only these models, of teacher, student and the runs",
    )
    return parser


def _options(optional: Sequence[Program]) -> str:
    return " or ".join(f"--{program.option}" for program in optional)


def _require_known_names(parser: argparse.ArgumentParser, program: Program, names: Sequence[str]) -> None:
    """Ends the program with a message if the option of `program` does not take one of these names."""
    for name in names:
        if name not in program.takes:
            choices = ", ".join(program.takes)
            parser.error(f"argument --{program.option}: invalid choice: {name!r} (choose from {choices})")
