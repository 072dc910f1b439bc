"""One optimizer step.

Every term of the loss is a sum over positions, divided once by the count over all ranks and accumulation steps
(docs/invariants.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dskd.config import LossConfig
from dskd.distributed.collectives import gather_json, sum_over_ranks
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.losses.head import Normalizers
from dskd.losses.terms import SUMS, TERMS, minimised_terms
from dskd.training.data.packed_step import Counts, StepBatches, loss_positions
from dskd.training.models.pair import ModelPair


@dataclass(frozen=True)
class Step:
    """An optimizer step that is about to be computed."""

    number: int  # counted from 1
    batches: StepBatches
    learning_rate: float
    started: float  # `time.perf_counter()` when the wait for its data began
    waited_s: float  # for its data
    is_last: bool
    needs_checkpoint: bool


@dataclass(frozen=True)
class StepResult:
    """The results of a step over all ranks."""

    loss: float  # the weighted sum that was minimised
    terms: dict[str, float]  # the unweighted mean of each term over its positions
    tokens: int  # positions with a target
    grad_norm: float  # before clipping
    stop_requested: bool  # by any rank, before the step began


def train_step(
    pair: ModelPair,
    step_batches: StepBatches,
    loss: LossConfig,
    world: World,
    *,
    step: int,
    stop_requested: bool = False,
) -> StepResult:
    """Runs the micro-batches of one optimizer step and updates the student.

    Args:
        pair: student and teacher.
        step_batches: this rank's micro-batches, as many as the engine accumulates, and counts of their positions.
        loss: weights and settings of the terms.
        world: the ranks.
        step: the step's number, for messages.
        stop_requested: True if this rank received a request to stop; the step passes it on to all ranks.

    Raises:
        UserError: if a term is not finite, naming it and its samples; the student's weights are then unchanged. Also
            if the gradient norm is not finite.
    """
    # Sum the counts of positions over all ranks before any loss is computed: they are the denominators of the terms.
    micro_batches = step_batches.micro_batches
    own_counts = torch.tensor([*step_batches.counts, stop_requested], device=world.device)
    *all_counts, stops = sum_over_ranks(own_counts).tolist()
    counts = Counts(*all_counts)
    normalizers = _normalizers(counts, world, len(micro_batches))
    engine = pair.engine
    losses, sums_of_micro_batches = [], []
    # Accumulate gradients: per micro-batch the teacher's forward pass, unless the shards have its result, then the
    # student's forward and backward pass.
    for number, batch in enumerate(micro_batches):
        teacher_hidden, student_inputs = pair.inputs_of(batch)
        loss_of_batch, sums_of_batch = engine(
            student_inputs,
            batch.get("position_ids"),
            labels=batch["labels"],
            loss_mask=loss_positions(batch),
            normalizers=normalizers,
            teacher_hidden=teacher_hidden,
            teacher_cache=batch.get("teacher_cache"),
            senses=batch.get("senses"),
            token_weights=_token_weights(batch["lexical"], loss, counts) if "lexical" in batch else None,
        )
        losses.append(loss_of_batch.detach().float())
        engine.backward(loss_of_batch)
        sums_of_micro_batches.append(sums_of_batch)
        # The last `engine.step()`, which updates the weights, comes after the check that all losses are finite.
        if number + 1 < len(micro_batches):
            engine.step()
    # Sum loss and terms over micro-batches and ranks in float64, in one collective operation.
    step_sums = torch.cat([torch.stack(losses).unsqueeze(-1), torch.stack(sums_of_micro_batches)], dim=-1)
    total_loss, *values = sum_over_ranks(step_sums.double().sum(0)).tolist()
    sums = dict(zip(SUMS, values, strict=True))
    _require_finite(sums, sums_of_micro_batches, micro_batches, step)
    engine.step()
    grad_norm = float(engine.get_global_grad_norm())
    if not math.isfinite(grad_norm):
        raise UserError(
            f"step {step}: the gradient norm is {grad_norm}, although every term of the loss is finite; the run stops "
            "without a checkpoint of this step. Lower train.learning_rate, or use precision: fp32",
            known_to_all_ranks=True,
        )
    # `_normalizers` scaled each micro-batch's loss up by this factor, because DeepSpeed divides gradients by it.
    mean_loss = total_loss / (world.world_size * len(micro_batches))
    return StepResult(mean_loss, _means(sums, counts), counts.tokens, grad_norm, stops > 0)


def _normalizers(counts: Counts, world: World, accumulation_steps: int) -> Normalizers:
    divided_by_deepspeed = world.world_size * accumulation_steps
    return Normalizers(*(divided_by_deepspeed / max(getattr(counts, name), 1) for name in Normalizers._fields))


def _token_weights(lexical: torch.Tensor, loss: LossConfig, counts: Counts) -> torch.Tensor:
    """Returns token weights [B, T] float32: `lexical_weight` where `lexical` [B, T] is True, otherwise 1; normalised.

    Their mean over the targets of the step is 1, so that a sum weighted with them and divided by the number of targets
    is a weighted mean: changing `lexical_weight` changes the emphasis but not the effective learning rate.
    """
    added_up = counts.targets + (loss.lexical_weight - 1) * counts.lexical
    return (1 + (loss.lexical_weight - 1) * lexical.float()) * (counts.targets / max(added_up, 1e-12))


def _means(sums: dict[str, float], counts: Counts) -> dict[str, float]:
    """Returns {term: its mean} for all terms; 0 if the count is 0."""

    def number(name: str) -> float:
        return sums[name] if name in sums else getattr(counts, name)

    return {term.name: sums[term.name] / max(number(term.mean_over), 1) for term in TERMS}


def _require_finite(
    sums: dict[str, float],
    sums_of_micro_batches: Sequence[torch.Tensor],
    micro_batches: Sequence[dict[str, Any]],
    step: int,
) -> None:
    if all(math.isfinite(value) for value in sums.values()):
        return
    terms = {term.name for term in minimised_terms()}
    own_culprits = [
        (name, batch["sample_ids"].tolist())
        for values, batch in zip(sums_of_micro_batches, micro_batches, strict=True)
        for name, value in zip(SUMS, values.tolist(), strict=True)
        if name in terms and not math.isfinite(value)
    ]
    culprits: dict[str, list[int]] = {}
    for name, samples in (item for rank in gather_json(own_culprits) for item in rank):
        culprits.setdefault(name, []).extend(samples)
    named = "; ".join(f"{name} on samples {sorted(samples)}" for name, samples in culprits.items())
    raise UserError(
        f"step {step}: the loss is not finite: {named}. The run stops, and the last checkpoint stays. Look at those "
        "samples of the training shards, lower train.learning_rate, or use precision: fp32, and continue with --resume",
        known_to_all_ranks=True,
    )
