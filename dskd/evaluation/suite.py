"""The steps that all evaluations share: skip what is up to date, load each model once, measure, publish, track.

An evaluation is a module that gives :func:`find_stale` one :class:`Measurement` for each model, with its recipe, and
:func:`run` a function that measures a loaded model. :mod:`dskd.evaluation.evaluations` says what else it needs.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dskd.artifacts.building import build_artifact, was_made_meanwhile
from dskd.artifacts.manifest import Recipe, is_current, write_json
from dskd.config import Config
from dskd.console import say, stage
from dskd.distributed.collectives import on_main
from dskd.distributed.world import World
from dskd.evaluation.evaluations import Evaluation
from dskd.evaluation.models import EvaluatedModel, load_candidate
from dskd.models.running.frozen import FrozenModel
from dskd.tracking import forget_unlogged, log_results, note_unlogged, read_unlogged

FILE, EXAMPLES_FILE = "measures.json", "examples.parquet"


@dataclass(frozen=True)
class Measurement:
    """A model to measure in an evaluation, and the recipe of its results."""

    evaluation: Evaluation
    candidate: EvaluatedModel
    recipe: Recipe
    reads: Sequence[Path | str] = ()  # further sources that are named when it begins

    def folder(self, config: Config) -> Path:
        """Returns the folder of the results."""
        return self.evaluation.folder_of(config, self.candidate.name)

    def is_current(self, config: Config) -> bool:
        """Returns True if the results exist, were made by this recipe, and are logged."""
        return is_current(self.folder(config), self.recipe) and not self._is_unlogged(config)

    def log_leftover_results(self, config: Config) -> None:
        """Logs results that a killed process has published but not logged."""
        if self._is_unlogged(config) and is_current(self.folder(config), self.recipe):
            say(f"  logging the results in {self.folder(config)}, left by an interrupted process")
            _log(config, self)

    def _is_unlogged(self, config: Config) -> bool:
        return config.tracking.enabled and read_unlogged(self.folder(config)) is not None


@dataclass(frozen=True)
class Outcome:
    """A model's results, ready to be written and logged."""

    measures: Mapping[str, Any]  # the content of measures.json
    metrics: Mapping[str, float]  # the values that MLflow gets
    data: str  # digest of the evaluation's data
    write_files: Callable[[Path], None]  # writes the examples and any other files into a folder
    lines: Sequence[str] = ()  # a summary to print
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the manifest
    tables: Sequence[str] = ()  # files that MLflow shows as tables
    files: Sequence[str] = ()  # other files that MLflow shows


def find_stale(config: Config, measurements: Sequence[Measurement], *, force: bool) -> list[Measurement]:
    """Returns the measurements whose results are not up to date, with `force` all of them; prints which are skipped.

    All ranks must call it. Rank 0 decides, because all ranks must measure the same models.
    """

    def find() -> list[int]:
        for measurement in () if force else measurements:
            measurement.log_leftover_results(config)
        return [n for n, measurement in enumerate(measurements) if force or not measurement.is_current(config)]

    stale = on_main(find)
    current = [measurement.folder(config) for number, measurement in enumerate(measurements) if number not in stale]
    if current:
        say(f"up to date: {', '.join(map(str, current))}")
    return [measurements[number] for number in stale]


def run(
    config: Config,
    world: World,
    stale: Sequence[Measurement],
    measure: Callable[[FrozenModel, Measurement], Callable[[], Outcome]],
    *,
    force: bool,
) -> None:
    """Measures models, and publishes and tracks their results; all ranks must call it.

    A model's measurements are adjacent in `stale`. `measure` measures a model on all ranks, and returns a function
    that makes the outcome, which rank 0 calls. With `force`, results are replaced even if another process has made them
    meanwhile.
    """
    for candidate, measurements in itertools.groupby(stale, key=lambda measurement: measurement.candidate):
        # Loaded by its first measurement, after the heading, and kept for the others.
        load = functools.cache(functools.partial(load_candidate, candidate, config, world))
        for measurement in measurements:
            sources = [candidate.folder.path, *measurement.reads]
            with stage(
                f"{measurement.evaluation.heading}: {candidate.name}", reads=sources, writes=measurement.folder(config)
            ):
                make_outcome = measure(load(), measurement)
                on_main(functools.partial(_publish, config, measurement, make_outcome, force=force))
        load().close()


def _publish(config: Config, measurement: Measurement, make_outcome: Callable[[], Outcome], *, force: bool) -> None:
    """Writes the results and logs those of a tracked run, unless another process has made the same ones meanwhile."""
    folder, outcome = measurement.folder(config), make_outcome()
    if not force and was_made_meanwhile(folder, measurement.recipe):
        return
    candidate = measurement.candidate
    is_tracked = bool(candidate.mlflow_run_id and config.tracking.enabled)
    with build_artifact(folder, measurement.recipe) as building:
        write_json(building.folder / FILE, outcome.measures)
        outcome.write_files(building.folder)
        building.facts.update(outcome.facts)
        forget_unlogged(folder)
        if is_tracked:
            message = {"measures": outcome.metrics, "data": outcome.data, "step": candidate.step}
            note_unlogged(folder, message | {"tables": outcome.tables, "files": outcome.files})
    for line in outcome.lines:
        say(f"  {line}")
    if is_tracked:
        _log(config, measurement)


def _log(config: Config, measurement: Measurement) -> None:
    """Logs the results that are noted as unlogged."""
    folder, run_id = measurement.folder(config), measurement.candidate.mlflow_run_id
    noted = read_unlogged(folder)
    if noted is not None and run_id:
        log_results(
            config,
            measurement.candidate.name,
            run_id,
            measurement.evaluation.folder,
            noted["measures"],
            folder / EXAMPLES_FILE,
            data=noted["data"],
            step=noted["step"],
            tables=[folder / name for name in noted["tables"]],
            files=[folder / name for name in noted["files"]],
        )
    forget_unlogged(folder)
