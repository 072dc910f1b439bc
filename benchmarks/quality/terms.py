"""Terms of the loss that only the study has, from the logits of a few words at each position.

They enter `dskd` when they have beaten their controls. Shapes: N positions, C words, D hidden, V vocabulary.
"""

import torch
from torch.nn import functional as F


def lexical_divergence(
    states: torch.Tensor,
    teacher_states: torch.Tensor,
    matrix: torch.Tensor,
    targets: torch.Tensor,
    related: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Returns the mean of T² KL(teacher ‖ student) over a target and its related words alone.

    The mean is over the positions whose target has related words; it is 0 if there are none.

    Args:
        states: the student's last hidden states [N, D].
        teacher_states: the teacher's [N, D].
        matrix: the output matrix [V, D] of both.
        targets: [N].
        related: [N, C] tokens, padded with -1.
        temperature: T.
    """
    at = (related >= 0).any(-1).nonzero().squeeze(-1)
    if not len(at):
        return states.sum() * 0
    words = torch.cat([targets[at, None], related[at]], dim=-1)
    rows, missing = matrix[words.clamp(min=0)], words < 0
    student, teacher = (
        torch.einsum("nd,ncd->nc", each[at], rows).div(temperature).masked_fill(missing, -torch.inf)
        for each in (states, teacher_states)
    )
    shares = teacher.softmax(-1)
    difference = (teacher.log_softmax(-1) - student.log_softmax(-1)).masked_fill(missing, 0)
    return temperature**2 * (shares * difference).sum(-1).mean()


def synonym_targets(
    states: torch.Tensor,
    teacher_states: torch.Tensor,
    matrix: torch.Tensor,
    targets: torch.Tensor,
    synonyms: torch.Tensor,
    share: float,
) -> torch.Tensor:
    """Returns the increase in mean cross-entropy when a share of a target's mass goes to it and its synonyms.

    The synonyms [N, C] and the target divide the `share` as the teacher's probabilities do. The cross-entropy with any
    target distribution is log Σ exp z minus the mean of z over it, so the increase is share · (z(target) - mean z).
    """
    at = (synonyms >= 0).any(-1).nonzero().squeeze(-1)
    if not len(at):
        return states.sum() * 0
    words = torch.cat([targets[at, None], synonyms[at]], dim=-1)
    rows, missing = matrix[words.clamp(min=0)], words < 0
    student, teacher = (torch.einsum("nd,ncd->nc", each[at], rows) for each in (states, teacher_states))
    shares = teacher.masked_fill(missing, -torch.inf).softmax(-1)
    return share * (student[:, 0] - (shares * student.masked_fill(missing, 0)).sum(-1)).sum() / len(states)


def entropies(states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Returns the entropy [N], in nats and on the CPU, of the next token after states [N, D]."""
    found = []
    for part in states.split(256):
        log_shares = F.linear(part.to(matrix.device), matrix).log_softmax(-1)
        found.append(-(log_shares.exp() * log_shares).sum(-1).cpu())
    return torch.cat(found)
