"""Measures teacher, cut student and exported students on the held-out shards, and writes WORKDIR/evaluation/NAME.

With --tasks, evaluates them on the paper's benchmarks instead, and writes WORKDIR/tasks/NAME/TASK. With --lexical,
measures their knowledge of words and senses instead, and writes WORKDIR/lexical/NAME.
"""

from dskd.cli.program import build_parser, parse, run_on_ranks
from dskd.config import TASKS, Config
from dskd.console import say
from dskd.distributed.world import World

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
    parser.add_argument(
        "--tasks",
        nargs="*",
        metavar="TASK",
        help=f"evaluate on benchmarks instead: {', '.join(TASKS)}, or all; without a name: those of tasks.evaluate",
    )
    parser.add_argument(
        "--lexical",
        action="store_true",
        help="measure lexical knowledge instead: sense separation, synonyms against antonyms, … (docs/evaluation.md)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="with --tasks or --lexical: only these models, of teacher, student and the runs",
    )
    args = parse(parser, "tasks", "models")
    on_tasks = args.tasks is not None
    for name in args.tasks or ():
        if name not in (*TASKS, "all"):
            parser.error(f"argument --tasks: invalid choice: {name!r} (choose from {', '.join(TASKS)}, all)")
    if args.models == []:
        parser.error("argument --models: expected at least one name, found only overrides")
    if args.models and not (on_tasks or args.lexical):
        parser.error("--models needs --tasks or --lexical; on held-out text, all models are evaluated")
    if on_tasks and args.lexical:
        parser.error("--tasks and --lexical exclude each other; give one of them at a time")

    def work(config: Config, world: World) -> None:
        # Imported here so that --help does not wait for torch.
        from dskd.distributed.collectives import on_main
        from dskd.evaluation.held_out_text import evaluate
        from dskd.evaluation.models import require_exports

        tasks = args.tasks or config.tasks.evaluate
        if on_tasks and not tasks:
            say("nothing to evaluate: --tasks names no benchmark, and tasks.evaluate is empty")
            return
        if not args.models:
            run_is_named = any(override.startswith("run=") for override in args.overrides)
            on_main(lambda: require_exports(config, run_is_named=run_is_named))
        if on_tasks:
            from dskd.evaluation.tasks import run_tasks

            run_tasks(config, world, tasks, args.models, force=args.force)
        elif args.lexical:
            from dskd.evaluation.lexical.run import run_lexical

            run_lexical(config, world, args.models, force=args.force)
        else:
            evaluate(config, world, force=args.force)

    run_on_ranks(args, work)


if __name__ == "__main__":
    main()
