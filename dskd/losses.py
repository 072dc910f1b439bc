"""The loss terms as pure functions. Each returns a *sum* over positions; the training step divides, once, by the count
over all ranks and accumulation steps.

Shapes: N positions, D hidden, V vocabulary, R rows of the sense dictionary in a micro-batch, K = kappa.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label) in nats (method, section 4: CE).

    Args:
        logits: [N, V], of any floating dtype; the sum is float32 or wider.
        labels: [N] token ids.
    """
    return F.cross_entropy(_at_least_float32(logits), labels, reduction="sum")


def kl_divergence_sum(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Sum over positions of KL(teacher || student) in nats, both distributions softened (method, section 4: KL).

    Zero exactly where the two give the same distribution. Without the factor T², which is the caller's.

    Args:
        student_logits: [N, V].
        teacher_logits: [N, V].
        temperature: T; logits are divided by it.
    """
    student_log_probs = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=-1)
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)


def hidden_distance_sum(hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> torch.Tensor:
    """Sum over positions of |h - t|² / D: the ablation that any claim about senses has to beat (not in the paper).

    Args:
        hidden: [N, D], the student's.
        teacher_hidden: [N, D].
    """
    difference = _at_least_float32(hidden) - _at_least_float32(teacher_hidden)
    return difference.square().sum() / hidden.shape[-1]


class SenseSums(NamedTuple):
    """Sums over the sampled positions of a micro-batch. `total` has the gradient; all are scalars."""

    total: torch.Tensor  # relation terms and own terms together: the numerator of L_sense
    synonym: torch.Tensor  # of the mean distance to P_i
    antonym: torch.Tensor  # of the mean hinge over N_i, before antonym_weight
    own: torch.Tensor  # of the mean distance to O_i
    active_hinges: torch.Tensor  # antonym rows within the margin
    hinges: torch.Tensor  # antonym rows


def sense_sums(
    hidden: torch.Tensor,
    sense_rows: torch.Tensor,
    *,
    relation_positions: torch.Tensor,
    synonym_index: torch.Tensor,
    antonym_index: torch.Tensor,
    own_positions: torch.Tensor,
    own_index: torch.Tensor,
    margin: float,
    antonym_weight: float,
) -> SenseSums:
    """The sense loss (method, section 4) with D(h, s) = |h - s|² / D.

    At a relation position i: mean over P_i of D + antonym_weight · mean over N_i of max(0, margin - D). At an own
    position i: mean over O_i of D. A mean over no rows is 0.

    Args:
        hidden: [N, D], the student's last hidden states.
        sense_rows: [R, D], the rows of the sense dictionary that this micro-batch points to.
        relation_positions: [n] indices into `hidden`.
        synonym_index: [n, K] indices into `sense_rows`, P_i, padded with -1.
        antonym_index: [n, K], N_i, padded with -1.
        own_positions: [m] indices into `hidden`.
        own_index: [m, K], O_i, padded with -1.
        margin: m, in units of D.
        antonym_weight: w_n.
    """
    hidden, sense_rows = _at_least_float32(hidden), _at_least_float32(sense_rows)
    at_relation = hidden[relation_positions]
    synonym_distance, synonym_exists = _distances(at_relation, sense_rows, synonym_index)
    antonym_distance, antonym_exists = _distances(at_relation, sense_rows, antonym_index)
    own_distance, own_exists = _distances(hidden[own_positions], sense_rows, own_index)

    hinge = (margin - antonym_distance).clamp(min=0)
    synonym = _mean_over_rows(synonym_distance, synonym_exists).sum()
    antonym = _mean_over_rows(hinge, antonym_exists).sum()
    own = _mean_over_rows(own_distance, own_exists).sum()
    return SenseSums(
        total=synonym + antonym_weight * antonym + own,
        synonym=synonym.detach(),
        antonym=antonym.detach(),
        own=own.detach(),
        active_hinges=((antonym_distance < margin) & antonym_exists).sum(),
        hinges=antonym_exists.sum(),
    )


def _distances(
    states: torch.Tensor, sense_rows: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """D(h, s) [n, K] of states [n, D] to the rows that `index` [n, K] names, and which of them exist [n, K]."""
    exists = index >= 0
    if sense_rows.shape[0] == 0:
        return index.to(states.dtype) * 0, exists
    rows = sense_rows[index.clamp(min=0)]  # [n, K, D]
    # |h - s|² = |h|² - 2 h·s + |s|²: one batched product, and no [n, K, D] difference is kept for the backward pass.
    products = torch.bmm(rows, states.unsqueeze(-1)).squeeze(-1)
    squares = states.square().sum(-1, keepdim=True) - 2 * products + sense_rows.square().sum(-1)[index.clamp(min=0)]
    return squares.clamp(min=0) / states.shape[-1], exists


def _mean_over_rows(values: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Mean of values [n, K] over the rows that exist; 0 where none does."""
    return torch.where(exists, values, 0).sum(-1) / exists.sum(-1).clamp(min=1)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
