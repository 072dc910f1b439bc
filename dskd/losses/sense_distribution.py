"""The sense loss as a divergence between distributions over sense embeddings."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from dskd.losses.logits import at_least_float32, divergence
from dskd.losses.sense_distance import in_parts

_SHORTEST = 1e-12  # length of a row; a shorter one has no direction


class SenseDivergenceSums(NamedTuple):
    """Sums over the sampled positions of a micro-batch; scalars."""

    total: torch.Tensor  # of KL(teacher || student): the numerator of L_sense
    teacher_entropy: torch.Tensor  # of the teacher's distribution, in nats


def sense_divergence(
    hidden: torch.Tensor,
    sense_rows: torch.Tensor,
    *,
    teacher_hidden: torch.Tensor,
    positions: torch.Tensor,
    candidate_index: torch.Tensor,
    random_index: torch.Tensor,
    temperature: float,
    distance: str,
    gradient: torch.Tensor | None = None,
    scale: float = 1.0,
) -> SenseDivergenceSums:
    """The sense loss as a divergence (not in the paper): at each position KL(teacher || student) between
    softmax(-distance / temperature) over candidates, some of the position's own and some that all positions share.

    Zero exactly where the two prefer each candidate to the others by as much; so at a position with less than two.

    Args:
        hidden: [N, D], the student's last hidden states.
        sense_rows: [R, D], rows of the sense dictionary.
        teacher_hidden: [N, D], the teacher's.
        positions: [n] different indices into the states.
        candidate_index: [n, C] indices into `sense_rows`, padded with -1; different ones at a position, and none of
            `random_index`: each candidate counts once.
        random_index: [S] different indices into `sense_rows`, candidates at every position.
        temperature: in units of the distance.
        distance: squared, |h - s|² / D; or cosine, 1 - cos(h, s), which no state's or row's length changes.
        gradient: [N, D], to which `scale` times the gradient of the total by `hidden` is added in place.
        scale: what for.
    """
    dtype, width, own = at_least_float32(hidden[:0]).dtype, hidden.shape[-1], candidate_index.shape[-1]
    sums = hidden.new_zeros(2, dtype=dtype)
    shared = sense_rows[random_index].to(dtype)
    parts = in_parts(len(positions), (own + 1) * width + len(shared), hidden.device.type)
    for part in parts if len(sense_rows) else ():
        at, named = positions[part], candidate_index[part]
        exists = F.pad(named >= 0, (0, len(shared)), value=True)
        rows = sense_rows[named.clamp(min=0)].to(dtype)
        lengths = torch.cat([_length(rows), _length(shared).expand(len(at), -1)], dim=-1)
        states, targets = hidden[at].to(dtype), teacher_hidden[at].to(dtype)
        # -distance / temperature = slope · (h·s) - offset, up to what all candidates of a position have in common.
        if distance == "cosine":
            length = _length(states).clamp(min=_SHORTEST).unsqueeze(-1)
            states, targets = states / length, F.normalize(targets, dim=-1, eps=_SHORTEST)
            slope, offset = 1 / (lengths.clamp(min=_SHORTEST) * temperature), torch.zeros_like(lengths)
        else:
            slope, offset = (
                torch.full_like(lengths, 2 / (width * temperature)),
                lengths.square() / (width * temperature),
            )
        # Not minus infinity: a position without candidates is then one where the two agree, and no NaN.
        z, z_teacher = (
            (_products(x, rows, shared) * slope - offset).masked_fill(~exists, torch.finfo(dtype).min)
            for x in (states, targets)
        )
        values, by_z = divergence(z, z_teacher)
        log_p = z_teacher.log_softmax(-1)
        sums += torch.stack([values.sum(), -(log_p.exp() * log_p).masked_fill(~exists, 0).sum()])
        if gradient is not None:
            weights = by_z.mul_(slope)
            change = torch.bmm(weights[:, :own].unsqueeze(1), rows).squeeze(1) + weights[:, own:] @ shared
            if distance == "cosine":  # by h, whose direction is only turned
                change = (change - (change * states).sum(-1, keepdim=True) * states) / length
            gradient[at] = (gradient[at] + scale * change).to(gradient.dtype)  # positions are different, as above
    return SenseDivergenceSums(*sums)


def _products(states: torch.Tensor, rows: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """h·s [n, C + S] of states [n, D] with rows [n, C, D] of their own and rows [S, D] of all."""
    return torch.cat([torch.bmm(rows, states.unsqueeze(-1)).squeeze(-1), states @ shared.T], dim=-1)


def _length(vectors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)
