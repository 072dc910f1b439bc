"""The programs that run evaluations: a row for each, with its option, its function, and its stage of the pipeline.

The options of `launcher/evaluate.py` and the stages of the pipeline follow from the rows. The modules that evaluate are
imported only when they run, so that `--help` does not wait for torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dskd.config import TASKS, Config
from dskd.distributed.world import World


@dataclass(frozen=True)
class Arguments:
    """The arguments of a command line that an evaluation reads."""

    names: Sequence[str]  # after the option
    models: Sequence[str] | None  # names of models (teacher, student, runs); None: all that exist
    force: bool  # also evaluate what is up to date


@dataclass(frozen=True)
class InPipeline:
    """The stage of the pipeline that runs an evaluation."""

    stage: str  # its name
    names: Callable[[Config], Sequence[str] | None]  # after the program's option; None: the config asks for no stage
    are_current: Callable[[Config, Sequence[str], Any], bool]  # of these names, with the teacher's ModelFolder


@dataclass(frozen=True)
class Program:
    """A program that `launcher/evaluate.py` runs on all ranks. Several evaluations can have the same one."""

    option: str  # with which it runs, without --; "" if it runs without an option
    help: str
    run: Callable[[Config, World, Arguments], object]
    takes: tuple[str, ...] = ()  # the names that may follow the option
    in_pipeline: InPipeline | None = None  # None: only users run it


def _run_held_out_text(config: Config, world: World, arguments: Arguments) -> None:
    from dskd.evaluation.held_out_text import evaluate

    evaluate(config, world, force=arguments.force)


def _held_out_text_is_current(config: Config, names: Sequence[str], teacher: Any) -> bool:
    from dskd.evaluation.held_out_text import are_current

    return are_current(config, teacher)


def _run_lexical(config: Config, world: World, arguments: Arguments) -> None:
    from dskd.evaluation.lexical.run import run_lexical

    run_lexical(config, world, arguments.models, force=arguments.force)


def _run_tasks(config: Config, world: World, arguments: Arguments) -> None:
    from dskd.evaluation.tasks import run_tasks

    run_tasks(config, world, arguments.names or config.tasks.evaluate, arguments.models, force=arguments.force)


def _tasks_are_current(config: Config, names: Sequence[str], teacher: Any) -> bool:
    from dskd.evaluation.tasks import are_current

    return are_current(config, names, teacher)


PROGRAMS = (  # the one without option first
    Program(
        "",
        "",
        _run_held_out_text,
        in_pipeline=InPipeline("evaluation", lambda config: (), _held_out_text_is_current),
    ),
    Program(
        "lexical",
        "measure lexical knowledge instead: sense separation, synonyms against antonyms, … (docs/evaluation.md)",
        _run_lexical,
    ),
    Program(
        "tasks",
        f"evaluate on benchmarks instead: {', '.join(TASKS)}, or all; without a name: those of tasks.evaluate",
        _run_tasks,
        takes=(*TASKS, "all"),
        in_pipeline=InPipeline("tasks", lambda config: config.tasks.evaluate or None, _tasks_are_current),
    ),
)
