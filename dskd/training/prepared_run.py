"""A run that is ready to train, and its steps."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.distributed.world import World
from dskd.tracking import Tracker
from dskd.training.data.packed_step import StepBatches
from dskd.training.models.pair import ModelPair
from dskd.training.schedule import Schedule
from dskd.training.step import Step


@dataclass(frozen=True)
class Run:
    """A run that is set up: the objects that the training loop uses."""

    config: Config
    world: World
    recipe: Recipe
    schedule: Schedule
    steps_done: int  # before this process
    pair: ModelPair
    batches: Generator[StepBatches, None, None]  # of the steps that are left
    tracker: Tracker
    began: float  # `time.perf_counter()` when this process began to prepare the run

    def steps(self) -> Iterator[Step]:
        """Yields the steps that are left, each once its data is loaded."""
        train, total = self.config.train, self.schedule.total_steps
        for steps_done in range(self.steps_done, total):
            started = time.perf_counter()
            batches = next(self.batches)
            number = steps_done + 1
            yield Step(
                number,
                batches,
                self.schedule.learning_rate(steps_done, train.peak_learning_rate, train.warmup_share),
                started,
                waited_s=time.perf_counter() - started,
                is_last=number == total,
                needs_checkpoint=number == total or number % train.checkpoint_every == 0,
            )

    def device_hours(self) -> float:
        """Returns the hours of all devices that the run has cost until now, over all of its restarts."""
        return self.tracker.device_hours + self.world.world_size * (time.perf_counter() - self.began) / 3600
