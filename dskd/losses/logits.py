"""The loss terms on logits and hidden states with their gradients, as pure functions.

:mod:`dskd.losses.sense_distance` has the terms on senses. A term is a *sum* over positions: the training step divides
once, by the count over all ranks and accumulation steps. Terms on logits are returned position by position.

Every function returns a gradient with its value. The head needs both in one pass over chunks of positions, and
gradients written by hand take a fraction of the memory that automatic differentiation would keep for them. What the
head costs beyond its matrix products is how often it reads and writes [N, V] numbers, so the terms share what they can.

Shapes: N positions, D hidden, V vocabulary, n tokens of a cached teacher.
"""

from typing import NamedTuple

import torch

from dskd.models.running.readouts import TopTokens

_LOG_2 = 0.6931471805599453


class LogitLosses(NamedTuple):
    """The cross-entropy and divergence at each position, and the gradient of their weighted sum."""

    ce: torch.Tensor  # [N], nats
    kl: torch.Tensor  # [N], nats; 0 without a teacher
    gradient: torch.Tensor  # [N, V], with respect to the student's logits


def logit_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | TopTokens | None,
    *,
    ce_scale: torch.Tensor,
    kl_scale: torch.Tensor,
    temperature: float = 1.0,
    kind: str = "forward_kl",
) -> LogitLosses:
    """Computes -log p(label) and the divergence of two softened distributions (docs/method.md, section 4: CE and KL).

    The divergence is zero exactly if the two distributions are the same. The caller multiplies it by T². If the two
    vocabularies are padded to different sizes, it is over the tokens that both have. If only the teacher's most
    probable tokens are known, both distributions are over n + 1 classes: these tokens, and all others together. The
    temperature softens these classes, because its effect on the tail of a distribution cannot be computed from the
    tail's total probability.

    Args:
        logits: [N, V], of any floating dtype; the results are float32 or wider.
        labels: [N] token ids.
        teacher: its logits [N, V'], its most probable tokens at each position, or None for no divergence.
        ce_scale: [N, 1], the factors of the cross-entropies in the sum whose gradient is returned.
        kl_scale: [N, 1], the factors of the divergences.
        temperature: T; logits are divided by it.
        kind: forward_kl, KL(teacher || student), which is the paper's; reverse_kl, KL(student || teacher); or
            jensen_shannon, the mean of the KL of each to the mean of both.
    """
    logits, at_label = at_least_float32(logits), labels.unsqueeze(-1)
    if isinstance(teacher, TopTokens):
        if teacher.token_ids.shape[-1] < logits.shape[-1]:
            return _losses_of_classes(logits, at_label, teacher, ce_scale, kl_scale, temperature, kind)
        # All tokens are known, and log-probabilities are logits.
        teacher = torch.empty_like(logits).scatter_(-1, teacher.token_ids, teacher.logprobs.to(logits.dtype))
    if teacher is None:
        temperature = 1.0
    student = _soften(logits, temperature)
    # The exponentials at temperature 1 are powers of those at T. The usual powers need no further exponential.
    if temperature == 1:
        powers, total = student.exponentials, student.total
    else:
        powers = student.exponentials.square() if temperature == 2 else (student.scaled * temperature).exp_()
        total = powers.sum(-1, keepdim=True)
    # -log p(label) = log Σ exp(z) - z(label), and its gradient is p, minus 1 at the label.
    ce = (total.log() - student.scaled.gather(-1, at_label) * temperature).squeeze(-1)
    gradient = powers * (ce_scale / total)
    gradient.scatter_add_(-1, at_label, -ce_scale)
    if teacher is None:
        return LogitLosses(ce, torch.zeros_like(ce), gradient)
    shared = min(logits.shape[-1], teacher.shape[-1])
    if shared < logits.shape[-1]:
        student = _soften(logits[:, :shared], temperature)
    softened_teacher = _soften(at_least_float32(teacher[:, :shared]), temperature)
    kl = _add_divergence(gradient[:, :shared], student, softened_teacher, kl_scale / temperature, kind)
    return LogitLosses(ce, kl, gradient)


def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, kind: str = "forward_kl"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence [N] of :func:`logit_losses` alone, and its sum's gradient for the student's logits.

    Args:
        student_logits: [N, V].
        teacher_logits: [N, V].
        temperature: T.
        kind: as in :func:`logit_losses`.
    """
    student, teacher = (_soften(at_least_float32(logits), temperature) for logits in (student_logits, teacher_logits))
    gradient = torch.zeros_like(student.exponentials)
    values = _add_divergence(gradient, student, teacher, 1 / temperature, kind)
    return values, gradient


def _losses_of_classes(
    logits: torch.Tensor,
    at_label: torch.Tensor,
    teacher: TopTokens,
    ce_scale: torch.Tensor,
    kl_scale: torch.Tensor,
    temperature: float,
    kind: str,
) -> LogitLosses:
    """Computes :func:`logit_losses` for a cached teacher, with one exponential per element; `at_label` is [N, 1]."""
    ids = teacher.token_ids
    # The logit of the class of all others is log Σ exp(z) over these; its own maximum keeps it exact if it is tiny.
    others = logits.scatter(-1, ids, -torch.inf)
    largest = others.amax(-1, keepdim=True)
    shares = others.sub_(largest).exp_()
    total = shares.sum(-1, keepdim=True)
    classes = torch.cat([logits.gather(-1, ids), largest + total.log()], dim=-1)
    log_normalizer = classes.logsumexp(-1, keepdim=True)
    ce = (log_normalizer - logits.gather(-1, at_label)).squeeze(-1)
    gradient = (classes - log_normalizer).exp_().mul_(ce_scale)
    known = torch.cat([teacher.logprobs, teacher.rest_logprob.unsqueeze(-1)], dim=-1).to(logits.dtype)
    student, softened_teacher = _soften(classes, temperature), _soften(known, temperature)
    kl = _add_divergence(gradient, student, softened_teacher, kl_scale / temperature, kind)
    # The chain rule from classes to logits: the class of all others passes its gradient to each of its tokens in
    # proportion to the token's share.
    of_logits = shares.mul_(gradient[:, -1:] / total).scatter_(-1, ids, gradient[:, :-1])
    return LogitLosses(ce, kl, of_logits.scatter_add_(-1, at_label, -ce_scale))


class _Softened(NamedTuple):
    """A softmax at temperature T in three parts; the probabilities are `exponentials / total`."""

    scaled: torch.Tensor  # [N, V], (z - max z) / T
    exponentials: torch.Tensor  # [N, V], their exponentials
    total: torch.Tensor  # [N, 1], the sums of these


def _soften(logits: torch.Tensor, temperature: float) -> _Softened:
    largest = logits.amax(-1, keepdim=True)
    scaled = torch.add(largest * (-1 / temperature), logits, alpha=1 / temperature)
    exponentials = scaled.exp()
    return _Softened(scaled, exponentials, exponentials.sum(-1, keepdim=True))


def _add_divergence(
    gradient: torch.Tensor, student: _Softened, teacher: _Softened, scale: torch.Tensor | float, kind: str
) -> torch.Tensor:
    """Returns the divergences [N], and adds the gradient of Σ scale · divergence for the student's z / T to `gradient`.

    Uses the memory of `scaled` of both. In the formulas q is the student's distribution and p the teacher's, and
    log q = scaled - log total.
    """
    log_totals = student.total.log(), teacher.total.log()
    of_q, of_p = scale / student.total, scale / teacher.total
    if kind == "forward_kl":
        # KL(p || q) = Σ p · (log p - log q), where the totals are the same for all tokens; its gradient is q - p.
        ratio = teacher.scaled.sub_(student.scaled).mul_(teacher.exponentials)
        values = ratio.sum(-1, keepdim=True) / teacher.total + (log_totals[0] - log_totals[1])
        gradient.addcmul_(student.exponentials, of_q).addcmul_(teacher.exponentials, of_p, value=-1)
        return values.squeeze(-1)
    # The gradient of E_q[log q - log r] is q · (log q - log r - E_q[log q - log r]) for a constant r. If r is the mean
    # of q and p, this is also the gradient of KL(q || r) + KL(p || r).
    if kind == "reverse_kl":
        ratio, share = student.scaled.sub_(teacher.scaled), 1.0
        rest = log_totals[1] - log_totals[0]
    else:
        log_q, log_p = student.scaled.sub_(log_totals[0]), teacher.scaled.sub_(log_totals[1])
        log_mixture = torch.logaddexp(log_p, log_q).sub_(_LOG_2)
        ratio, share = log_q.sub_(log_mixture), 0.5
        rest = log_p.sub_(log_mixture).mul_(teacher.exponentials).sum(-1, keepdim=True) / teacher.total
    expected = (ratio * student.exponentials).sum(-1, keepdim=True) / student.total
    gradient.addcmul_(ratio.sub_(expected).mul_(student.exponentials), of_q, value=share)
    return ((expected + rest) * share).squeeze(-1)


def hidden_distance(hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the sum of |h - t|² / D over positions: the baseline that any claim about senses must beat.

    It is not in the paper.

    Args:
        hidden: [N, D], the student's.
        teacher_hidden: [N, D].

    Returns:
        A scalar, and its gradient with respect to `hidden` [N, D].
    """
    difference = at_least_float32(hidden) - at_least_float32(teacher_hidden)
    return difference.square().sum() / hidden.shape[-1], difference.mul_(2 / hidden.shape[-1])


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in float32, or unchanged if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
