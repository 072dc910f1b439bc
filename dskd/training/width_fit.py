"""The values from which the width map starts: the least-squares fit of the student's states to the teacher's.

With random values, the first steps would pull the student towards states that the map cannot produce yet.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dskd.config import Config
from dskd.console import progress_bar, say, warn
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.running.frozen import load_frozen
from dskd.training.data.collator import Collator
from dskd.training.data.loader import load_steps
from dskd.training.inputs import TrainingInputs
from dskd.training.models.pair import ModelPair
from dskd.training.models.width_map import StateSums
from dskd.training.schedule import Schedule

SEQUENCES = 256  # that the fit reads, rounded up to whole steps, or those of one epoch if there are fewer
# AdamW's first steps change every weight by the learning rate, whatever its gradient. In a student with random weights,
# 5e-4 replaced the states as a whole in one step (docs/training.md), for which a fit to the old states is useless.
_LARGE_FIRST_RATE = 2e-5
_LOW_R_SQUARED = 0.5  # less is typical of random weights


@dataclass(frozen=True)
class WidthFit:
    """The facts about a fit that training reports."""

    sequences: int
    positions: int
    r_squared: float  # share of the variance of the teacher's states that the mapped ones explain


@torch.no_grad()
def fit_width_map(
    pair: ModelPair, config: Config, inputs: TrainingInputs, schedule: Schedule, cache: Path, world: World
) -> WidthFit:
    """Sets the map to the best fit over the sequences of the first steps, at the positions that count in the loss.

    Every rank must call it, before the first step. Any number of ranks fits the same sequences, up to rounding.

    Args:
        pair: student and teacher. If there is no teacher, and the shards have no states, one is loaded for the fit.
        config: the experiment.
        inputs: the run's inputs.
        schedule: its batches.
        cache: the node's folder for unpacked shards.
        world: the ranks.

    Raises:
        UserError: if states are not finite, or no position counts in the loss.
    """
    source, parameter = inputs.fit_source, pair.engine.module.width_map.weight
    assert source is not None, "load_inputs finds one for a student of another width"
    width, own = parameter.ds_shape
    sums = StateSums.zeros(own, width, world.device)
    steps = min(math.ceil(SEQUENCES / schedule.global_batch_size), schedule.steps_per_epoch)
    with contextlib.ExitStack() as stack:
        if source.kind == "loaded" and pair.teacher is None:
            teacher = load_frozen(inputs.teacher, config, world, with_head=False)
            stack.callback(teacher.close)
            pair = replace(pair, teacher=teacher)
        # The run's own first steps: every number of ranks has the same, and their shards are then already unpacked.
        collate = Collator(None, None, micro_batch_size=schedule.micro_batch_size, states=source.columns)
        first_steps = load_steps(config, replace(schedule, total_steps=steps), collate, cache, world, start_step=0)
        bar = stack.enter_context(progress_bar(total=steps, label="fitting the width map", unit="steps"))
        for step in stack.enter_context(contextlib.closing(first_steps)):
            for batch in step.micro_batches:
                targets, student_inputs = pair.inputs_of(batch)
                states = pair.engine(student_inputs, batch.get("position_ids"), only_states=True)
                assert targets is not None
                sums.add(states[batch["loss_mask"]], targets[batch["loss_mask"]])
            bar.update(1)
    sums.sum_over_ranks()
    if not (sums.gram.isfinite().all() and sums.cross.isfinite().all() and sums.squares.isfinite()):
        raise UserError(
            f"{inputs.student.path}: the states of student or teacher are not finite on the training text, so the map "
            "between their widths cannot be fitted; use precision: fp32, or another student",
            known_to_all_ranks=True,
        )
    weight, r_squared = sums.solve()
    set_width_map(pair.engine, weight, world)
    fit = WidthFit(steps * schedule.global_batch_size, int(sums.count), r_squared)
    say(
        f"  states of width {own} are mapped to the teacher's {width}: the least-squares fit over {fit.sequences:,} "
        f"sequences ({fit.positions:,} positions) has R² {fit.r_squared:.4f}"
    )
    first_rate = schedule.learning_rate(0, config.train.peak_learning_rate, config.train.warmup_share)
    if world.is_main and fit.r_squared < _LOW_R_SQUARED and first_rate > _LARGE_FIRST_RATE:
        warn(
            f"the first step has the learning rate {first_rate:.1e}, which can change all states of a student whose "
            f"fit is this low; hidden-state distance and sense loss may then grow many times over in the first steps. "
            f"Raise train.warmup_share, or lower train.learning_rate, so that the first step has "
            f"{_LARGE_FIRST_RATE:.0e} or less"
        )
    return fit


@torch.no_grad()
def set_width_map(engine: Any, weight: torch.Tensor, world: World) -> None:
    """Sets the weight [D', D] of the map in a student's engine that has taken no step yet.

    Every rank must call it; rank 0's `weight` counts.
    """
    import deepspeed  # imported here so that commands without a model do not wait for it

    parameter = engine.module.width_map.weight
    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        if world.is_main:
            parameter.copy_(weight)
    # The optimizer has a copy of each parameter, which would overwrite the map in the first step. Before that step,
    # the copies of all others equal their parameters, and this changes none of them.
    engine.optimizer.refresh_fp32_params()
