"""The table of evaluations: their names, folders and kinds, for those that make results and those that show them.

A further evaluation is an entry here, with the `CardSection` that model cards show, a kind in
:mod:`dskd.artifacts.kinds`, a module that measures with :mod:`dskd.evaluation.suite`, and a line in
:mod:`dskd.evaluation.programs`. It also needs a stage in :mod:`dskd.pipeline` if the pipeline should run it.
"""

from dataclasses import dataclass
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.kinds import Kind
from dskd.config import TASKS, Config
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
EVALUATIONS = {evaluation.name: evaluation for evaluation in (HELD_OUT, LEXICAL, *BENCHMARKS.values())}
