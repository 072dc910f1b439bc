"""Measures teacher, untrained student and exported students on the held-out shards, and writes WORKDIR/evaluation/NAME.

With --tasks, evaluates them on the paper's benchmarks instead, and writes WORKDIR/tasks/NAME/TASK. With --lexical,
measures their knowledge of words and senses instead, and writes WORKDIR/lexical/NAME.
"""

from dskd.cli.program import build_parser, parse, run_on_ranks
from dskd.config import Config
from dskd.distributed.world import World
from dskd.evaluation.programs import PROGRAMS, Arguments

EPILOG = """
examples:
  deepspeed launcher/evaluate.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/evaluate.py --config configs/quickstart.yaml --force
  deepspeed launcher/evaluate.py --config mine.yaml tasks.limit=200 --tasks arc_challenge mmlu
  deepspeed launcher/evaluate.py --config mine.yaml --tasks all
  deepspeed launcher/evaluate.py --config mine.yaml --tasks                 the benchmarks of tasks.evaluate
  deepspeed launcher/evaluate.py --config mine.yaml --tasks mmlu --models teacher dskd
  deepspeed launcher/evaluate.py --config mine.yaml --lexical
  deepspeed launcher/evaluate.py --config mine.yaml --lexical --models teacher dskd

The keys under `tasks` say where the benchmarks' files are (`dskd config`).
`dskd compare` prints the measures side by side. Models whose measures are up to date are skipped. A run without an
export is left out, unless run=NAME chooses it: then that is an error.
"""


def main() -> None:
    parser = build_parser(__doc__, EPILOG)
    parser.add_argument("--force", action="store_true", help="evaluate again, even what is up to date")
    without_option, *optional = PROGRAMS
    instead = parser.add_mutually_exclusive_group()
    for program in optional:
        form = {"nargs": "*", "metavar": "NAME"} if program.takes else {"action": "store_const", "const": []}
        instead.add_argument(f"--{program.option}", help=program.help, **form)
    options = " or ".join(f"--{program.option}" for program in optional)
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"with {options}: only these models, of teacher, student and the runs",
    )
    args = parse(parser, "models", *(program.option for program in optional))
    program = next((each for each in optional if getattr(args, each.option) is not None), without_option)
    arguments = Arguments(getattr(args, program.option, ()), args.models, args.force)
    for name in arguments.names:
        if name not in program.takes:
            choices = ", ".join(program.takes)
            parser.error(f"argument --{program.option}: invalid choice: {name!r} (choose from {choices})")
    if args.models == []:
        parser.error("argument --models: expected at least one name, found only overrides")
    if args.models and program is without_option:
        parser.error(f"--models needs {options}; on held-out text, all models are evaluated")

    def work(config: Config, world: World) -> None:
        # Imported here so that --help does not wait for torch.
        from dskd.distributed.collectives import on_main
        from dskd.evaluation.models import require_exports
        from dskd.evaluation.results_in_cards import update_cards

        if not args.models:
            run_is_named = any(override.startswith("run=") for override in args.overrides)
            on_main(lambda: require_exports(config, run_is_named=run_is_named))
        program.run(config, world, arguments)
        on_main(lambda: update_cards(config))

    run_on_ranks(args, work)


if __name__ == "__main__":
    main()
