"""The table of evaluations: what `launcher/evaluate.py` starts, and what `dskd compare` shows or leaves out.

A further evaluation is a module, which uses :mod:`dskd.evaluation.suite`, and an entry in `PROGRAMS`, with the
`CardSection` that model cards show. It also needs a
kind in :mod:`dskd.artifacts.kinds`, and a stage in :mod:`dskd.pipeline` if the pipeline should run it. The modules are
imported only when they run, so that programs start fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.kinds import Kind
from dskd.config import TASKS, Config
from dskd.distributed.world import World
from dskd.evaluation import card_sections
from dskd.evaluation.card_sections import CardSection


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of models: on held-out text, on words and senses, or on a benchmark."""

    name: str  # such as `piqa`, for options and messages
    title: str  # heads its measures in a comparison
    heading: str  # heads its output, before the model's name
    folder: str  # its folder among a run's artifacts in MLflow, such as `tasks/piqa`
    made_by: str  # the command that evaluates, for messages
    kind: Kind  # of its results
    in_card: CardSection

    @property
    def tag(self) -> str:
        """The tag in which a tracked run has the digest of the evaluation's data."""
        from dskd.tracking import data_tag

        return data_tag(self.folder)

    def folder_of(self, config: Config, model: str) -> Path:
        """Returns the folder of a model's results in the work directory, such as `WORKDIR/tasks/teacher/piqa`."""
        first, *rest = self.folder.split("/")
        return config.path(first, model, *rest)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a command line that an evaluation reads."""

    names: Sequence[str]  # after the option
    models: Sequence[str] | None  # names of models (teacher, student, runs); None: all that exist
    force: bool  # evaluate also what is up to date


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


HELD_OUT = Evaluation(
    "evaluation",
    "Held-out text",
    "evaluate",
    kinds.EVALUATION.folder,
    kinds.EVALUATION.made_by,
    kinds.EVALUATION,
    card_sections.HELD_OUT,
)
LEXICAL = Evaluation(
    "lexical",
    "Words and senses",
    "lexical knowledge",
    kinds.LEXICAL.folder,
    kinds.LEXICAL.made_by,
    kinds.LEXICAL,
    card_sections.LEXICAL,
)
BENCHMARKS: dict[str, Evaluation] = {
    name: Evaluation(
        name,
        "Benchmarks",
        name,
        f"{kinds.TASK.folder}/{name}",
        f"{kinds.TASK.made_by} {name}",
        kinds.TASK,
        card_sections.of_benchmark(name),
    )
    for name in TASKS
}
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
EVALUATIONS = {evaluation.name: evaluation for program in PROGRAMS for evaluation in program.evaluations}
