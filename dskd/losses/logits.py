"""The loss terms on logits and hidden states with their gradients, as pure functions.

:mod:`dskd.losses.sense_distance` has the terms on senses. A term is a *sum* over positions: the training step divides
once, by the count over all ranks and accumulation steps. Terms on logits are returned position by position, so that
:mod:`dskd.losses.head` can weight them.

Every function returns a gradient with its value. The head needs both in one pass over chunks of positions, and
gradients written by hand take a fraction of the memory that automatic differentiation would keep for them.

Shapes: N positions, D hidden, V vocabulary, n tokens of a cached teacher.
"""

import torch

from dskd.models.readouts import TopTokens

_LOG_2 = 0.6931471805599453


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes -log p(label) in nats (docs/method.md, section 4: CE), and its gradient.

    Args:
        logits: [N, V], of any floating dtype; the result is float32 or wider.
        labels: [N] token ids.

    Returns:
        The value at each position [N], and the gradient of their sum by the logits [N, V].
    """
    logits = at_least_float32(logits)
    gradient, log_normalizer = _softmax(logits)
    at_label = labels.unsqueeze(-1)
    # -log p(label) = log Σ exp(z) - z(label), and its gradient is p, minus 1 at the label.
    values = (log_normalizer - logits.gather(-1, at_label)).squeeze(-1)
    return values, gradient.scatter_add_(-1, at_label, gradient.new_full((), -1.0).expand(at_label.shape))


def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, kind: str = "forward_kl"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the divergence of two softened distributions at each position in nats (docs/method.md, section 4: KL).

    It is zero exactly if the two distributions are the same. The caller multiplies by T².

    Args:
        student_logits: [N, V].
        teacher_logits: [N, V].
        temperature: T; logits are divided by it.
        kind: forward_kl, KL(teacher || student), which is the paper's; reverse_kl, KL(student || teacher); or
            jensen_shannon, the mean of the KL of each to the mean of both.

    Returns:
        The value at each position [N], and the gradient of their sum by the student's logits [N, V].
    """
    z, z_teacher = (at_least_float32(logits) / temperature for logits in (student_logits, teacher_logits))
    # q is the student's distribution, p the teacher's: log q = z - log_normalizer, and log p likewise. The tensors are
    # [N, V], so each kind reuses them in place.
    (q, log_normalizer), (p, log_teacher_normalizer) = _softmax(z), _softmax(z_teacher)
    if kind == "jensen_shannon":
        log_q, log_p = z - log_normalizer, z_teacher - log_teacher_normalizer
        log_mixture = torch.logaddexp(log_p, log_q) - _LOG_2
        of_student, gradient = _reverse_kl(q, log_q - log_mixture)
        values, gradient = (((log_p - log_mixture) * p).sum(-1) + of_student) / 2, gradient.div_(2)
    elif kind == "reverse_kl":
        values, gradient = _reverse_kl(q, z.sub_(z_teacher) - (log_normalizer - log_teacher_normalizer))
    else:
        # KL(p || q) = Σ p · (log p - log q), where the normalizers are the same for all tokens; its gradient is q - p.
        values = z_teacher.sub_(z).mul_(p).sum(-1) + (log_normalizer - log_teacher_normalizer).squeeze(-1)
        gradient = q.sub_(p)
    # The gradients above are by z = logits / T.
    return values, gradient.div_(temperature)


def cached_divergence(
    student_logits: torch.Tensor, teacher: TopTokens, temperature: float = 1.0, kind: str = "forward_kl"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes :func:`divergence` if only the teacher's most probable tokens are known.

    Both distributions are over n + 1 classes: these tokens, and all others together. The temperature softens these
    classes, because its effect on the tail of a distribution cannot be computed from the tail's total probability. With
    n = V this is :func:`divergence`.

    Args:
        student_logits: [N, V].
        teacher: its n most probable tokens at each position.
        temperature: T.
        kind: as in :func:`divergence`.

    Returns:
        The value at each position [N], and the gradient of their sum by the student's logits [N, V].
    """
    logits, ids = at_least_float32(student_logits), teacher.token_ids
    log_z = logits.logsumexp(-1, keepdim=True)
    classes = logits.gather(-1, ids) - log_z
    teacher_classes = teacher.logprobs.to(logits.dtype)
    if ids.shape[-1] == logits.shape[-1]:
        values, gradient = divergence(classes, teacher_classes, temperature, kind)
        return values, torch.zeros_like(logits).scatter_(-1, ids, gradient)
    # The student's log-probability of the class of all others, from its logits without the n known tokens.
    others = logits.scatter(-1, ids, -torch.inf)
    log_rest = others.logsumexp(-1, keepdim=True)
    values, gradient = divergence(
        torch.cat([classes, log_rest - log_z], dim=-1),
        torch.cat([teacher_classes, teacher.rest_logprob.to(logits.dtype).unsqueeze(-1)], dim=-1),
        temperature,
        kind,
    )
    # From gradients by classes to gradients by logits: those of the classes sum to 0, so the contribution of log_z
    # cancels. The class of all others passes its gradient to each of its tokens in proportion to the token's share.
    shares = others.sub_(log_rest).exp_()
    return values, shares.mul_(gradient[:, -1:]).scatter_(-1, ids, gradient[:, :-1])


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns probabilities [N, V] and log Σ exp(logits) [N, 1], with only one exponential per element."""
    probabilities = logits.softmax(-1)
    # log Σ exp(z) = z - log p(z) for every token; the largest logit's probability never underflows.
    largest = logits.amax(-1, keepdim=True), probabilities.amax(-1, keepdim=True)
    return probabilities, largest[0] - largest[1].log()


def _reverse_kl(q: torch.Tensor, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes E_q[ratio] [N] for ratio = log q - log r, and its gradient by the logits of q if r is constant.

    If r is the mean of q and a constant p, the gradient is that of KL(q || r) + KL(p || r).
    """
    expected = (ratio * q).sum(-1, keepdim=True)
    return expected.squeeze(-1), ratio.sub_(expected).mul_(q)


def hidden_distance(hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the sum of |h - t|² / D over positions: the baseline that any claim about senses must beat.

    It is not in the paper.

    Args:
        hidden: [N, D], the student's.
        teacher_hidden: [N, D].

    Returns:
        A scalar, and its gradient by `hidden` [N, D].
    """
    difference = at_least_float32(hidden) - at_least_float32(teacher_hidden)
    return difference.square().sum() / hidden.shape[-1], difference.mul_(2 / hidden.shape[-1])


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in float32, or unchanged if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
