"""Running the trainings of the study in this process, one after the other, with the functions of `launcher/train.py`.

They share a process because starting one takes longer than a small training. Finished trainings are skipped. The others
run in order of importance: tuning and test of all arms, then one factor after the other.
"""

import dataclasses
import datetime
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import study, work
from benchmarks.quality.judge import Judge
from benchmarks.quality.results import REFERENCES, STUDENT, TEACHER, Result, Stage, append_result, choose, read_results
from benchmarks.quality.splits import Split
from benchmarks.quality.study import Arm
from benchmarks.report import machine
from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.lock import lock_if_free
from dskd.console import say
from dskd.distributed.world import World
from dskd.training.exporting.export import build_export
from dskd.training.train import train

_WAIT_S = 5.0  # between two checks of other processes' trainings, on which more trainings may depend


@dataclass(frozen=True)
class Training:
    """A training of the study, finished or not."""

    stage: Stage
    arm: Arm
    seed: int
    value: float
    variant: str | None
    keys: Mapping[str, Any]

    @property
    def run(self) -> str:
        """Name of the run, which its checkpoints and its export have."""
        name = f"{self.stage}-{self.arm.name}-{self.seed}"
        return f"{name}-{self.value:g}" if self.stage == "tune" else name


def planned_trainings(results: list[Result], stages: tuple[Stage, ...]) -> Iterator[Training]:
    """Yields the trainings of the study in order; those that depend on a tuned value come once it is chosen."""
    chosen: dict[str, float] = {}
    arms = [arm for arm in study.ARMS if arm.past_variant is None]
    for arm in arms:
        if arm.based_on is not None and arm.based_on not in chosen:
            continue
        keys = study.keys_of(arm, chosen)
        for value in (*(arm.trials if arm.is_tuned else ()), *arm.extra_values) if "tune" in stages else ():
            for seed in study.TUNING_SEEDS:
                yield Training("tune", arm, seed, value, None, keys | {arm.tuned_key: value})
        best = choose(results, arm)
        if best is not None:
            chosen[arm.name] = best
    ready = [arm for arm in arms if arm.name in chosen]
    for seed in (
        study.TEST_SEEDS if "test" in stages else ()
    ):  # seed by seed, so that an early end leaves complete pairs
        for arm in ready:
            yield _with_choice("test", arm, seed, None, chosen)
    for factor in (None, *study.FACTORS) if "factor" in stages else ():
        for seed in study.FACTOR_SEEDS:
            for arm in ready:
                if study.is_needed(factor, arm.name):
                    weight = (
                        chosen if arm.name == study.FACTOR_BASELINE else chosen | {arm.name: study.FACTOR_SENSE_WEIGHT}
                    )
                    yield _with_choice("factor", arm, seed, factor.name if factor else None, weight)


def _with_choice(stage: Stage, arm: Arm, seed: int, variant: str | None, chosen: Mapping[str, float]) -> Training:
    value = chosen[arm.name]
    return Training(stage, arm, seed, value, variant, study.keys_of(arm, chosen) | {arm.tuned_key: value})


class Runner:
    """A runner that does the trainings and saves their results.

    Args:
        folder: folder of the work directories.
        path: the results file.
        world: the ranks, which must be one.
        base: the config that all trainings share.
    """

    def __init__(self, folder: Path, path: Path, world: World, base: Path = study.BASE) -> None:
        self.results = read_results(path)
        self._folder, self._path, self._world, self._base = folder, path, world, base
        self._judges: dict[tuple[str | None, Split], Judge] = {}
        self._digests: dict[str | None, str] = {}

    def run(self, stages: tuple[Stage, ...], budget_s: float) -> bool:
        """Does all trainings that are not done yet; returns False if the time is over first.

        Several processes can do this at once: each takes a training that no other process is doing, and ends when no
        training is left or in progress.
        """
        started = time.monotonic()
        while True:
            self.results = read_results(self._path)
            is_busy = False
            for training in planned_trainings(self.results, stages):
                if self.is_done(training):
                    continue
                if time.monotonic() - started > budget_s:
                    say("the time is over; the same command continues from here")
                    return False
                with lock_if_free(self._folder / f".{training.run}-{training.variant}.lock") as is_ours:
                    if is_ours and not self.is_done(training, reread=True):
                        self.run_training(training)
                        break  # start over: the result may make other trainings possible
                    is_busy = is_busy or not is_ours
            else:
                if not is_busy:
                    return True
                time.sleep(_WAIT_S)

    def is_done(self, training: Training, *, reread: bool = False) -> bool:
        """Returns True if there is a result of this training on these shards.

        With `reread`, first reads the file again, to which other processes write, too.
        """
        if reread:
            self.results = read_results(self._path)
        return self._result(training, {}, 0.0).name in {result.name for result in self.results}

    def run_training(self, training: Training) -> Result:
        """Trains, exports and measures; saves and returns the result."""
        config = work.load_variant(
            self._folder,
            training.variant,
            {"run": training.run, "seed": training.seed} | dict(training.keys),
            self._base,
        )
        # The teacher's own measures are saved before the student's: they show how much there is to transfer.
        split: Split = "validation" if training.stage == "tune" else "test"
        judge = self._judge(training, split)
        began = time.monotonic()
        train(config, self._world, overwrite=True)
        build_export(config)
        shutil.rmtree(kinds.checkpoint_folder(config))
        result = self._result(training, judge.measure_run(config), time.monotonic() - began)
        if training.stage == "tune":  # students of the tuning are not needed again
            shutil.rmtree(config.path(kinds.EXPORT.folder, training.run))
        self._keep(result)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result.measures.items())
        say(f"{training.run}{f' ({training.variant})' if training.variant else ''}: {shown}; {result.seconds:.0f} s")
        return result

    def _judge(self, training: Training, split: Split) -> Judge:
        variant = training.variant
        if (variant, split) not in self._judges:
            shared = work.load_variant(self._folder, variant, {"run": training.run}, self._base)
            judge = self._judges[variant, split] = Judge(shared, split, self._world)
            if split == "test":
                self._keep_references(judge, variant)
        return self._judges[variant, split]

    def _keep_references(self, judge: Judge, variant: str | None) -> None:
        stage: Stage = "test" if variant is None else "factor"
        done = {result.name for result in read_results(self._path)}
        for name in (TEACHER,) if variant is not None else REFERENCES:
            empty = Result(stage, name, 0, variant, {}, None, {}, self._digest(variant), 0.0, *_where_and_when())
            if empty.name not in done:
                measures = judge.measure_student() if name == STUDENT else judge.references[name]
                self._keep(dataclasses.replace(empty, measures=measures))

    def _digest(self, variant: str | None) -> str:
        if variant not in self._digests:
            work.prepare(self._folder, variant, self._base)
            config = work.load_variant(self._folder, variant, {}, self._base)
            self._digests[variant] = shards.load_manifest(config, "train").digest
        return self._digests[variant]

    def _result(self, training: Training, measures: Mapping[str, float], seconds: float) -> Result:
        return Result(
            training.stage,
            training.arm.name,
            training.seed,
            training.variant,
            dict(training.keys),
            training.value,
            measures,
            self._digest(training.variant),
            round(seconds, 1),
            *_where_and_when(),
        )

    def _keep(self, result: Result) -> None:
        append_result(self._path, result)
        self.results = read_results(self._path)


def _where_and_when() -> tuple[str, str]:
    here = machine()
    words = f"{here['device']}, {here['cores']} cores, {here['memory_gb']} GB, torch {here['torch']}"
    return datetime.date.today().isoformat(), words
