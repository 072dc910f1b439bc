"""The loss terms and their gradients, as pure functions. Each term is a *sum* over positions; the training step
divides, once, by the count over all ranks and accumulation steps.

Every function returns its gradient with its value: :mod:`dskd.head` needs both in one pass over chunks of positions,
and written out they take a fraction of the memory that automatic differentiation keeps for them.

Shapes: N positions, D hidden, V vocabulary, n tokens of a cached teacher, R rows of the sense dictionary, K = kappa.
"""

from typing import NamedTuple

import torch

_LOG_2 = 0.6931471805599453


class CachedTeacher(NamedTuple):
    """The teacher's most probable tokens at N positions, at temperature 1, and how much it leaves for all others."""

    token_ids: torch.Tensor  # [N, n]
    logprobs: torch.Tensor  # [N, n], natural logarithms
    rest_logprob: torch.Tensor  # [N], of the probability of all other tokens together


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log p(label) in nats (method, section 4: CE), and its gradient.

    Args:
        logits: [N, V], of any floating dtype; the result is float32 or wider.
        labels: [N] token ids.

    Returns:
        A scalar, and its gradient by the logits [N, V].
    """
    logits = _at_least_float32(logits)
    gradient, log_normalizer = _softmax(logits)
    at_label = labels.unsqueeze(-1)
    total = (log_normalizer - logits.gather(-1, at_label)).sum()
    return total, gradient.scatter_add_(-1, at_label, gradient.new_full((), -1.0).expand(at_label.shape))


def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, kind: str = "forward_kl"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over positions of the divergence of two distributions in nats, both softened (method, section 4: KL).

    Zero exactly where the two give the same distribution. Without the factor T², which is the caller's.

    Args:
        student_logits: [N, V].
        teacher_logits: [N, V].
        temperature: T; logits are divided by it.
        kind: forward_kl, KL(teacher || student), which is the paper's; reverse_kl, KL(student || teacher); or
            jensen_shannon, the mean of the KL of each to the mean of both.

    Returns:
        A scalar, and its gradient by the student's logits [N, V].
    """
    z, z_teacher = (_at_least_float32(logits) / temperature for logits in (student_logits, teacher_logits))
    (q, log_normalizer), (p, log_teacher_normalizer) = _softmax(z), _softmax(z_teacher)
    if kind == "jensen_shannon":
        log_q, log_p = z - log_normalizer, z_teacher - log_teacher_normalizer
        log_mixture = torch.logaddexp(log_p, log_q) - _LOG_2
        of_student, gradient = _reverse_kl(q, log_q - log_mixture)
        total, gradient = (((log_p - log_mixture) * p).sum() + of_student) / 2, gradient.div_(2)
    elif kind == "reverse_kl":
        total, gradient = _reverse_kl(q, z.sub_(z_teacher) - (log_normalizer - log_teacher_normalizer))
    else:
        total = (z_teacher.sub_(z).mul_(p).sum(-1, keepdim=True) - log_teacher_normalizer + log_normalizer).sum()
        gradient = q.sub_(p)
    return total, gradient.div_(temperature)


def cached_divergence(
    student_logits: torch.Tensor, teacher: CachedTeacher, temperature: float = 1.0, kind: str = "forward_kl"
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`divergence` from a teacher of whom only the most probable tokens are known.

    Both distributions are over n + 1 classes, those tokens and all others together, and are softened as such: what the
    temperature does to the tail of a distribution cannot be known from its mass. With n = V this is
    :func:`divergence`.

    Args:
        student_logits: [N, V].
        teacher: its n most probable tokens at each position.
        temperature: T.
        kind: as there.

    Returns:
        A scalar, and its gradient by the student's logits [N, V].
    """
    logits, ids = _at_least_float32(student_logits), teacher.token_ids
    log_z = logits.logsumexp(-1, keepdim=True)
    classes = logits.gather(-1, ids) - log_z
    teacher_classes = teacher.logprobs.to(logits.dtype)
    if ids.shape[-1] == logits.shape[-1]:
        total, gradient = divergence(classes, teacher_classes, temperature, kind)
        return total, torch.zeros_like(logits).scatter_(-1, ids, gradient)
    others = logits.scatter(-1, ids, -torch.inf)
    log_rest = others.logsumexp(-1, keepdim=True)
    total, gradient = divergence(
        torch.cat([classes, log_rest - log_z], dim=-1),
        torch.cat([teacher_classes, teacher.rest_logprob.to(logits.dtype).unsqueeze(-1)], dim=-1),
        temperature,
        kind,
    )
    # By the logits: the gradients of the classes add up to 0, so what log_z contributes cancels; the class of the
    # others hands its gradient on to each of them by its share.
    shares = others.sub_(log_rest).exp_()
    return total, shares.mul_(gradient[:, -1:]).scatter_(-1, ids, gradient[:, :-1])


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [N, V], and the logarithm of what they were divided by [N, 1]; in one exponential an element."""
    probabilities = logits.softmax(-1)
    # The largest logit has the probability exp(0) / normalizer, which never underflows.
    largest = logits.amax(-1, keepdim=True), probabilities.amax(-1, keepdim=True)
    return probabilities, largest[0] - largest[1].log()


def _reverse_kl(q: torch.Tensor, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of E_q[ratio] for ratio = log q - log r, and its gradient by the logits of q where r is a constant.

    Where r is the mean of q and a constant p, the gradient is that of KL(q || r) + KL(p || r).
    """
    expected = (ratio * q).sum(-1, keepdim=True)
    return expected.sum(), ratio.sub_(expected).mul_(q)


def hidden_distance(hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over positions of |h - t|² / D: the ablation that any claim about senses has to beat (not in the paper).

    Args:
        hidden: [N, D], the student's.
        teacher_hidden: [N, D].

    Returns:
        A scalar, and its gradient by `hidden` [N, D].
    """
    difference = _at_least_float32(hidden) - _at_least_float32(teacher_hidden)
    return difference.square().sum() / hidden.shape[-1], difference.mul_(2 / hidden.shape[-1])


class SenseSums(NamedTuple):
    """Sums over the sampled positions of a micro-batch; scalars."""

    total: torch.Tensor  # relation terms and own terms together: the numerator of L_sense
    synonym: torch.Tensor  # of the mean distance to P_i
    antonym: torch.Tensor  # of the mean hinge over N_i, before antonym_weight
    own: torch.Tensor  # of the mean distance to O_i
    active_hinges: torch.Tensor  # antonym rows within the margin
    hinges: torch.Tensor  # antonym rows


# Floats of gathered rows that exist at one time: 8 MB, 128 MB.
_GATHERED = {"cpu": 2**21, "cuda": 2**25}


def sense_loss(
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
    gradient: torch.Tensor | None = None,
    scale: float = 1.0,
) -> SenseSums:
    """The sense loss (method, section 4) with D(h, s) = |h - s|² / D.

    At a relation position i: mean over P_i of D + antonym_weight · mean over N_i of max(0, margin - D). At an own
    position i: mean over O_i of D. A mean over no rows is 0.

    Rows are gathered for a few positions at a time, in bounded memory; only where kappa rows of one position are more
    than that (thousands) are they the bound.

    Args:
        hidden: [N, D], the student's last hidden states.
        sense_rows: [R, D], rows of the sense dictionary.
        relation_positions: [n] different indices into `hidden`.
        synonym_index: [n, K] indices into `sense_rows`, P_i, padded with -1.
        antonym_index: [n, K], N_i, padded with -1.
        own_positions: [m] different indices into `hidden`.
        own_index: [m, K], O_i, padded with -1.
        margin: m, in units of D.
        antonym_weight: w_n.
        gradient: [N, D], to which `scale` times the gradient of the total by `hidden` is added in place.
        scale: what for.
    """
    kappa = synonym_index.shape[-1]
    sums = hidden.new_zeros(5, dtype=_at_least_float32(hidden[:0]).dtype)
    groups = (
        (relation_positions, torch.cat([synonym_index, antonym_index], dim=-1), kappa),
        (own_positions, own_index, own_index.shape[-1]),
    )
    for is_own, (positions, index, pulling) in enumerate(groups):
        for part in _parts(len(positions), index.shape[-1] * hidden.shape[-1], hidden.device.type):
            at, named = positions[part], index[part]
            exists = named >= 0
            states = _at_least_float32(hidden[at])
            rows = sense_rows[named.clamp(min=0)].to(states.dtype) if len(sense_rows) else None
            if rows is None:
                continue
            distance = _distance(states, rows)
            near, far = exists[:, :pulling], exists[:, pulling:]
            pull = near / near.sum(-1, keepdim=True).clamp(min=1)
            push = far / far.sum(-1, keepdim=True).clamp(min=1)
            hinge = (margin - distance[:, pulling:]).clamp(min=0)
            active = far & (hinge > 0)
            attraction = (distance[:, :pulling] * pull).sum()
            if is_own:
                sums[2] += attraction
            else:
                sums += torch.stack(
                    [attraction, (hinge * push).sum(), torch.zeros_like(attraction), active.sum(), far.sum()]
                )
            if gradient is not None:
                # By h: Σ_k w_k · 2(h - s_k) / D, where w_k is the derivative by the distance of row k.
                weights = torch.cat([pull.to(states.dtype), -antonym_weight * (push * active).to(states.dtype)], dim=-1)
                towards = torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
                change = (states * weights.sum(-1, keepdim=True) - towards) * (2 * scale / hidden.shape[-1])
                # Positions are different within a group, so nothing is lost and no atomic addition makes runs differ.
                gradient[at] = (gradient[at] + change).to(gradient.dtype)
    synonym, antonym, own, active_hinges, hinges = sums
    return SenseSums(synonym + antonym_weight * antonym + own, synonym, antonym, own, active_hinges, hinges)


def _distance(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """D(h, s) [n, K] of states [n, D] to rows [n, K, D]."""
    # |h - s|² = |h|² - 2 h·s + |s|²: one batched product, and no [n, K, D] difference.
    products = torch.bmm(rows, states.unsqueeze(-1)).squeeze(-1)
    squares = rows.square().sum(-1) - 2 * products + states.square().sum(-1, keepdim=True)
    return squares.clamp(min=0) / states.shape[-1]


def _parts(count: int, row_size: int, device: str) -> list[slice]:
    size = max(1, _GATHERED[device] // max(row_size, 1))
    return [slice(start, start + size) for start in range(0, count, size)]


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
