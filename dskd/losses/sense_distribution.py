"""The sense loss as a divergence between distributions over sense embeddings."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from dskd.losses.logits import at_least_float32, divergence
from dskd.losses.sense_distance import in_parts

_SHORTEST = 1e-12  # shorter vectors have no direction


class SenseDivergenceSums(NamedTuple):
    """The sums over the sampled positions of a micro-batch; scalars."""

    total: torch.Tensor  # sum of KL(teacher || student): the numerator of L_sense
    teacher_entropy: torch.Tensor  # sum of the entropies of the teacher's distributions, in nats


def sense_divergence(
    hidden: torch.Tensor,
    sense_rows: torch.Tensor,
    *,
    teacher_hidden: torch.Tensor,
    positions: torch.Tensor,
    candidate_rows: torch.Tensor,
    random_rows: torch.Tensor,
    temperature: float,
    distance: str,
    gradient: torch.Tensor | None = None,
    scale: float = 1.0,
) -> SenseDivergenceSums:
    """Computes the sense loss as a divergence (not in the paper).

    At each position it is KL(teacher || student) between distributions softmax(-distance / temperature) over candidate
    rows. Some candidates belong to the position, the others are shared by all positions. The divergence is zero exactly
    if both models prefer each candidate to the others by the same amount; with fewer than two candidates it is zero.

    Args:
        hidden: [N, D], the student's last hidden states.
        sense_rows: [R, D], rows of the sense dictionary.
        teacher_hidden: [N, D], the teacher's last hidden states.
        positions: [n] distinct indices into the states.
        candidate_rows: [n, C] indices into `sense_rows`, padded with -1. Those of a position are distinct and not in
            `random_rows`, so that each candidate counts once.
        random_rows: [S] distinct indices into `sense_rows`, which are candidates at every position.
        temperature: in units of the distance.
        distance: "squared", |h - s|² / D; or "cosine", 1 - cos(h, s), which does not depend on lengths.
        gradient: [N, D]; the gradient of the total with respect to `hidden`, times `scale`, is added to it in place.
        scale: the factor for the added gradient.
    """
    dtype, width, private = at_least_float32(hidden[:0]).dtype, hidden.shape[-1], candidate_rows.shape[-1]
    sums = hidden.new_zeros(2, dtype=dtype)
    shared = sense_rows[random_rows].to(dtype)
    parts = in_parts(len(positions), (private + 1) * width + len(shared), hidden.device.type)
    # Gather the candidates of a few positions at a time. Shared ones are not copied per position.
    for part in parts if len(sense_rows) else ():
        at, row_index = positions[part], candidate_rows[part]
        exists = F.pad(row_index >= 0, (0, len(shared)), value=True)
        rows = sense_rows[row_index.clamp(min=0)].to(dtype)
        lengths = torch.cat([_length(rows), _length(shared).expand(len(at), -1)], dim=-1)
        states, targets = hidden[at].to(dtype), teacher_hidden[at].to(dtype)
        # -distance / temperature = slope · (h·s) - offset, plus a constant that is the same for all candidates of a
        # position, which the softmax ignores. `slope` and `offset` [n, C + S] depend on the candidates alone.
        if distance == "cosine":
            length = _length(states).clamp(min=_SHORTEST).unsqueeze(-1)
            states, targets = states / length, F.normalize(targets, dim=-1, eps=_SHORTEST)
            slope, offset = 1 / (lengths.clamp(min=_SHORTEST) * temperature), torch.zeros_like(lengths)
        else:
            slope, offset = (
                torch.full_like(lengths, 2 / (width * temperature)),
                lengths.square() / (width * temperature),
            )
        # Missing candidates get the lowest finite value. With minus infinity, a position without any candidates would
        # give NaN; this way the two distributions agree there.
        z, z_teacher = (
            (_products(x, rows, shared) * slope - offset).masked_fill(~exists, torch.finfo(dtype).min)
            for x in (states, targets)
        )
        # Compare the two distributions. The entropy of the teacher's shows whether the temperature fits it.
        values, by_z = divergence(z, z_teacher)
        log_p = z_teacher.log_softmax(-1)
        sums += torch.stack([values.sum(), -(log_p.exp() * log_p).masked_fill(~exists, 0).sum()])
        if gradient is not None:
            # The chain rule from the logits z to h: the derivative of z with respect to h is slope · s.
            weights = by_z.mul_(slope)
            change = torch.bmm(weights[:, :private].unsqueeze(1), rows).squeeze(1) + weights[:, private:] @ shared
            if distance == "cosine":  # the loss depends on h's direction alone, so keep the part orthogonal to h
                change = (change - (change * states).sum(-1, keepdim=True) * states) / length
            # Positions are distinct, so no update is lost.
            gradient[at] = (gradient[at] + scale * change).to(gradient.dtype)
    return SenseDivergenceSums(*sums)


def _products(states: torch.Tensor, rows: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Returns h·s [n, C + S] of states [n, D] with each one's own rows [n, C, D] and the shared rows [S, D]."""
    return torch.cat([torch.bmm(rows, states.unsqueeze(-1)).squeeze(-1), states @ shared.T], dim=-1)


def _length(vectors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)
