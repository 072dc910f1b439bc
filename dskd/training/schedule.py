"""The schedule of a run: its number of optimizer steps, their batch sizes and learning rates."""

import math
from dataclasses import dataclass

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest
from dskd.config import Config, TrainConfig
from dskd.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """The number of steps of a run, and the size of their batches."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int  # micro-batches per rank and step
    steps_per_epoch: int
    total_steps: int

    @property
    def samples_per_rank(self) -> int:
        """Number of samples that one rank runs in a step."""
        return self.micro_batch_size * self.accumulation_steps

    def learning_rate(self, step: int, peak: float, warmup_share: float) -> float:
        """Returns the rate of step 0, 1, …: it rises linearly over the warm-up, then falls as a cosine to 0
        (docs/method.md, section 4).
        """
        warmup = round(warmup_share * self.total_steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))


def plan_schedule(config: Config, manifest: Manifest, world_size: int) -> Schedule:
    """Computes the steps and batches of a run.

    Raises:
        UserError: if the global batch cannot be divided among the ranks, or there is less data than one batch.
    """
    from dskd import shards  # imported here so that a batch that cannot be divided is refused without torch

    train = config.train
    global_batch = train.global_batch_size
    micro_batch, accumulation_steps = divide_batch(train, world_size)
    shards.require_samples(
        manifest, config.path(kinds.SHARDS.folder, "train"), global_batch, "train.global_batch_size, one step"
    )
    steps_per_epoch = manifest.facts["samples"] // global_batch
    return Schedule(
        global_batch, micro_batch, accumulation_steps, steps_per_epoch, count_steps(train, manifest.facts["samples"])
    )


def count_steps(train: TrainConfig, num_samples: int) -> int:
    """Returns the number of optimizer steps of a run over `num_samples` samples."""
    return (
        train.steps
        if train.steps is not None
        else max(1, round(train.epochs * (num_samples // train.global_batch_size)))
    )


def describe_learning_rate(train: TrainConfig) -> str:
    """Describes the peak learning rate of a run and, if it depends on the batch size, how it was computed."""
    text = f"peak learning rate {train.peak_learning_rate:.4g}"
    if train.learning_rate_batch_size is None:
        return text
    rule = train.learning_rate_rule.replace("_", " ")
    return f"{text}, from {train.learning_rate:.4g} at a batch of {train.learning_rate_batch_size} ({rule} rule)"


def divide_batch(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """Returns the samples per micro-batch, and the micro-batches per rank and step.

    Raises:
        UserError: if the global batch cannot be divided evenly.
    """
    global_batch = train.global_batch_size
    if global_batch % world_size:
        raise UserError(
            f"train.global_batch_size: {global_batch} sequences cannot be divided among {world_size} ranks; "
            f"set it to a multiple of {world_size}, or use "
            f"{next(ranks for ranks in range(world_size - 1, 0, -1) if global_batch % ranks == 0)} ranks"
        )
    per_rank = global_batch // world_size
    micro_batch = min(train.micro_batch_size, per_rank)
    if per_rank % micro_batch:
        raise UserError(
            f"train.micro_batch_size: each of {world_size} ranks has {per_rank} sequences a step, which is not a "
            f"multiple of {micro_batch}; set it to a divisor of {per_rank}"
        )
    return micro_batch, per_rank // micro_batch
