"""The sense loss as distances to rows of the sense dictionary, with its gradient, as in the paper.

:mod:`dskd.losses.sense_distribution` has the other form, a divergence of two distributions over rows. Values are *sums*
over positions, as in :mod:`dskd.losses`. Rows are gathered for a few positions at a time, so that memory is bounded,
unless the rows of a single position (thousands) exceed the bound.

Shapes: N positions, D hidden, R rows of the sense dictionary, K = kappa.
"""

from typing import NamedTuple

import torch

from dskd.losses.logits import at_least_float32


class SenseSums(NamedTuple):
    """The sums over the sampled positions of a micro-batch; scalars."""

    total: torch.Tensor  # weighted relation terms plus own terms: the numerator of L_sense
    synonym: torch.Tensor  # sum of the mean distances to P_i, before synonym_weight
    antonym: torch.Tensor  # sum of the mean hinges over N_i, before antonym_weight
    own: torch.Tensor  # sum of the mean distances to O_i
    active_hinges: torch.Tensor  # number of antonym rows within the margin
    hinges: torch.Tensor  # number of antonym rows


# Elements of gathered rows that exist at once: 8 MB of float32 on a CPU, 128 MB on a GPU.
_GATHERED = {"cpu": 2**21, "cuda": 2**25}


def sense_loss(
    hidden: torch.Tensor,
    sense_rows: torch.Tensor,
    *,
    relation_positions: torch.Tensor,
    synonym_rows: torch.Tensor,
    antonym_rows: torch.Tensor,
    own_positions: torch.Tensor,
    own_rows: torch.Tensor,
    margin: float,
    antonym_weight: float,
    synonym_weight: float = 1.0,
    gradient: torch.Tensor | None = None,
    scale: float = 1.0,
) -> SenseSums:
    """Computes the sense loss (docs/method.md, section 4) with D(h, s) = |h - s|² / D.

    A relation position i contributes synonym_weight · mean over P_i of D + antonym_weight · mean over N_i of
    max(0, margin - D). An own position i contributes the mean over O_i of D. A mean over no rows is 0.

    Args:
        hidden: [N, D], the student's last hidden states.
        sense_rows: [R, D], rows of the sense dictionary.
        relation_positions: [n] distinct indices into `hidden`.
        synonym_rows: [n, K] indices into `sense_rows`, P_i, padded with -1.
        antonym_rows: [n, K] indices into `sense_rows`, N_i, padded with -1.
        own_positions: [m] distinct indices into `hidden`.
        own_rows: [m, K] indices into `sense_rows`, O_i, padded with -1.
        margin: m, in units of D.
        antonym_weight: w_n.
        synonym_weight: the weight of the pull to P_i; 1 in the paper.
        gradient: [N, D]; the gradient of the total with respect to `hidden`, times `scale`, is added to it in place.
        scale: the factor for the added gradient.
    """
    # Relation positions have two sets of rows, first those that pull and then those that push. Own positions only have
    # rows that pull. Both kinds take the same path.
    kappa = synonym_rows.shape[-1]
    sums_of_relations = hidden.new_zeros(
        4, dtype=at_least_float32(hidden[:0]).dtype
    )  # pull, push, active and all hinges
    own = sums_of_relations.new_zeros(())
    groups = (
        (relation_positions, torch.cat([synonym_rows, antonym_rows], dim=-1), kappa, False),
        (own_positions, own_rows, own_rows.shape[-1], True),
    )
    for positions, index, pulling, is_own in groups:
        parts = in_parts(len(positions), index.shape[-1] * hidden.shape[-1], hidden.device.type)
        for part in parts if len(sense_rows) else ():
            # Gather the rows of a few positions. Padding gathers row 0, and gets no weight below.
            at, row_index = positions[part], index[part]
            exists = row_index >= 0
            states = at_least_float32(hidden[at])
            rows = sense_rows[row_index.clamp(min=0)].to(states.dtype)
            distance = _distance(states, rows)
            # `pull` and `push` are the weights of the rows in the two means.
            far = exists[:, pulling:]
            pull, push = _weights_in_mean(exists[:, :pulling]), _weights_in_mean(far)
            # Antonyms push only within the margin: a hinge farther away is 0 and has no gradient.
            hinge = (margin - distance[:, pulling:]).clamp(min=0)
            active = far & (hinge > 0)
            attraction = (distance[:, :pulling] * pull).sum()
            if is_own:
                own += attraction
            else:
                sums_of_relations += torch.stack([attraction, (hinge * push).sum(), active.sum(), far.sum()])
            if gradient is not None:
                # The derivatives of the total for the distance of each row.
                pulled = (1.0 if is_own else synonym_weight) * pull.to(states.dtype)
                weights = torch.cat([pulled, -antonym_weight * (push * active).to(states.dtype)], dim=-1)
                _add_gradient(gradient, at, states, rows, weights, scale)
    synonym, antonym, active_hinges, hinges = sums_of_relations
    total = synonym_weight * synonym + antonym_weight * antonym + own
    return SenseSums(total, synonym, antonym, own, active_hinges, hinges)


def _weights_in_mean(exists: torch.Tensor) -> torch.Tensor:
    """Returns the weight of each row [n, K] in the mean over those of a position that exist; padding has weight 0."""
    return exists / exists.sum(-1, keepdim=True).clamp(min=1)


def _add_gradient(
    gradient: torch.Tensor,
    at: torch.Tensor,
    states: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> None:
    """Adds the gradient for states [n, D], times `scale`, to the rows `at` [n] of `gradient`, which are distinct.

    With weights w_k [n, K] of the distances to rows s_k [n, K, D] it is Σ_k w_k · 2(h - s_k) / D.
    """
    towards = torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
    change = (states * weights.sum(-1, keepdim=True) - towards) * (2 * scale / states.shape[-1])
    # Rows are distinct, so plain indexing loses no update, and runs are reproducible because no atomic additions are
    # needed.
    gradient[at] = (gradient[at] + change).to(gradient.dtype)


def _distance(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns the distances D(h, s) [n, K] of states [n, D] to rows [n, K, D]."""
    # |h - s|² = |h|² - 2 h·s + |s|² needs one batched product, and no difference of shape [n, K, D]. This repeats
    # :mod:`dskd.senses.distances` except for the order of the sum: one order for both would change the last bits of the
    # losses, or of dictionaries and shards, and with them which of two rows at equal distances is the nearest.
    products = torch.bmm(rows, states.unsqueeze(-1)).squeeze(-1)
    squares = rows.square().sum(-1) - 2 * products + states.square().sum(-1, keepdim=True)
    return squares.clamp(min=0) / states.shape[-1]


def in_parts(count: int, row_size: int, device: str) -> list[slice]:
    """Returns slices of `count` positions, each so small that its gathered rows stay within the bound for the device.

    `row_size` is the number of gathered elements per position.
    """
    size = max(1, _GATHERED[device] // max(row_size, 1))
    return [slice(start, start + size) for start in range(0, count, size)]
