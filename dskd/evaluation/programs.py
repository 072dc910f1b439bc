"""The programs that `launcher/evaluate.py` runs: one for each of its options.

The modules that evaluate are imported only when they run, so that `--help` does not wait for torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dskd.config import TASKS, Config
from dskd.distributed.world import World
from dskd.evaluation.table import BENCHMARKS, HELD_OUT, LEXICAL, Evaluation


@dataclass(frozen=True)
class Arguments:
    """The arguments of a command line that an evaluation reads."""

    names: Sequence[str]  # after the option
    models: Sequence[str] | None  # names of models (teacher, student, runs); None: all that exist
    force: bool  # also evaluate what is up to date


@dataclass(frozen=True)
class Program:
    """A program that `launcher/evaluate.py` runs on all ranks, and its evaluations."""

    option: str  # with which it runs, without --; "" if it runs without an option
    help: str
    run: Callable[[Config, World, Arguments], object]
    evaluations: Sequence[Evaluation]
    takes: Sequence[str] = ()  # the names that may follow the option


def _run_held_out_text(config: Config, world: World, arguments: Arguments) -> None:
    from dskd.evaluation.held_out_text import evaluate

    evaluate(config, world, force=arguments.force)


def _run_tasks(config: Config, world: World, arguments: Arguments) -> None:
    from dskd.evaluation.tasks import run_tasks

    run_tasks(config, world, arguments.names or config.tasks.evaluate, arguments.models, force=arguments.force)


def _run_lexical(config: Config, world: World, arguments: Arguments) -> None:
    from dskd.evaluation.lexical.run import run_lexical

    run_lexical(config, world, arguments.models, force=arguments.force)


PROGRAMS = (
    Program("", "", _run_held_out_text, [HELD_OUT]),
    Program(
        "lexical",
        "measure lexical knowledge instead: sense separation, synonyms against antonyms, … (docs/evaluation.md)",
        _run_lexical,
        [LEXICAL],
    ),
    Program(
        "tasks",
        f"evaluate on benchmarks instead: {', '.join(TASKS)}, or all; without a name: those of tasks.evaluate",
        _run_tasks,
        [*BENCHMARKS.values()],
        takes=(*TASKS, "all"),
    ),
)
