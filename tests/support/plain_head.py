"""The loss of the head in its plain formulation, with whole logits and autograd, on a small random batch in float64."""

from typing import Any

import torch
from torch.nn import functional as F

from dskd.config import LossConfig
from dskd.losses.head import Normalizers
from dskd.losses.terms import SUMS
from dskd.models.structure.output_head import LogitTransform

B, T, D, V, R, K = 2, 6, 5, 11, 4, 2
D_NARROW = 3  # of a student whose states are mapped to D


def random_case() -> dict[str, Any]:
    """Returns states, matrices, labels and senses of a small batch in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": random(B, T, D),
        "weight": random(V, D),
        "teacher_hidden": random(B, T, D),
        "teacher_weight": random(V, D),
        "labels": torch.randint(0, V, (B, T), generator=generator),
        "loss_mask": torch.rand(B, T, generator=generator) < 0.7,
        "senses": {
            "sense_rows": random(R, D),
            "relation_positions": torch.tensor([1, 8]),
            "synonym_rows": torch.tensor([[0, 1], [2, -1]]),
            "antonym_rows": torch.tensor([[3, -1], [-1, -1]]),
            "own_positions": torch.tensor([2, 3, 9]),
            "own_rows": torch.tensor([[0, -1], [1, 2], [3, 0]]),
        },
        "candidates": {
            "sense_rows": random(R, D),
            "positions": torch.tensor([9, 1, 8]),
            "candidate_rows": torch.tensor([[0, 3], [-1, 0], [-1, -1]]),
            "random_rows": torch.tensor([1, 2]),
        },
        "narrow_hidden": random(B, T, D_NARROW),
        "narrow_weight": random(V, D_NARROW),
        "width_map": random(D, D_NARROW),
    }


def plain_loss(
    case,
    loss,
    hidden,
    weight,
    normalizers,
    teacher_weight=None,
    token_weights=None,
    mapped=None,
    transforms=("", ""),
):
    """Computes L as in section 4 of the paper, one expression for each term, with loops for the senses."""
    mask, compared = case["loss_mask"], hidden if mapped is None else mapped
    emphasis = 1 if token_weights is None else token_weights[mask]
    teacher_weight = case["teacher_weight"] if teacher_weight is None else teacher_weight
    logits, teacher = hidden @ weight.T, case["teacher_hidden"] @ teacher_weight.T
    logits, teacher = (FORMULAS[name](z) for name, z in zip(transforms, (logits, teacher), strict=True))
    ce = F.cross_entropy(logits[mask], case["labels"][mask], reduction="none")
    p, q = ((z / loss.temperature).softmax(-1)[mask] for z in (teacher, logits))
    m = (p + q) / 2
    kl = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jensen_shannon": (p * (p / m).log() + q * (q / m).log()) / 2,
    }[loss.divergence].sum(-1)
    distance = ((compared - case["teacher_hidden"]) ** 2).mean(-1)[mask].sum()
    senses = _plain_senses if loss.sense_form == "distance" else _plain_sense_divergence
    total = senses(case, loss, compared.reshape(-1, D))
    of_logits = (emphasis * (loss.ce_weight * ce + loss.kd_weight * loss.temperature**2 * kl)).sum()
    return (
        normalizers.targets * (of_logits + loss.hidden_weight * distance)
        + normalizers.senses * loss.sense_weight * total,
        (ce.sum(), kl.sum(), distance, total),
    )


def _plain_senses(case, loss, flat):
    senses, total = case["senses"], 0
    for position, near, far in zip(
        senses["relation_positions"], senses["synonym_rows"], senses["antonym_rows"], strict=True
    ):
        pulls = [((flat[position] - senses["sense_rows"][row]) ** 2).mean() for row in near if row >= 0]
        pushes = [
            (loss.margin - ((flat[position] - senses["sense_rows"][row]) ** 2).mean()).clamp(min=0)
            for row in far
            if row >= 0
        ]
        total = total + loss.synonym_weight * sum(pulls) / len(pulls)
        total = total + (loss.antonym_weight * sum(pushes) / len(pushes) if pushes else 0)
    for position, rows in zip(senses["own_positions"], senses["own_rows"], strict=True):
        pulls = [((flat[position] - senses["sense_rows"][row]) ** 2).mean() for row in rows if row >= 0]
        total = total + sum(pulls) / len(pulls)
    return total


def _plain_sense_divergence(case, loss, flat):
    senses, total = case["candidates"], 0
    for position, rows in zip(senses["positions"], senses["candidate_rows"], strict=True):
        named = senses["sense_rows"][[row for row in rows.tolist() if row >= 0] + senses["random_rows"].tolist()]
        q, p = (
            (-(states[position] - named).square().mean(-1) / loss.sense_temperature).softmax(-1)
            for states in (flat, case["teacher_hidden"].reshape(-1, D))
        )
        total = total + (p * (p / q).log()).sum()
    return total


# The names of transforms, with a formula and the product's class for each.
FORMULAS = {
    "": lambda z: z,
    "scale": lambda z: z * 0.3,
    "cap": lambda z: torch.tanh(z / 2.0) * 2.0,
    "both": lambda z: torch.tanh(z * 1.6 / 1.1) * 1.1,
}
TRANSFORMS = {
    "": LogitTransform(),
    "scale": LogitTransform(0.3),
    "cap": LogitTransform(cap=2.0),
    "both": LogitTransform(1.6, cap=1.1),
}
WEIGHTS = {"ce_weight": 0.9, "kd_weight": 0.7, "sense_weight": 1.3, "hidden_weight": 0.4}
LOSS = LossConfig(**WEIGHTS, margin=6.0, synonym_weight=0.8, antonym_weight=0.6)
DISTRIBUTION = LossConfig(**WEIGHTS, sense_form="distribution", sense_temperature=0.6)
NORMALIZERS = Normalizers(targets=0.25, senses=0.5)


def run_head(case, head, **changes):
    """Returns the loss, {term: its sum}, and the gradients of three times the loss by states and output matrix."""
    hidden = case["hidden"].clone().requires_grad_()
    inputs = {
        "labels": case["labels"],
        "loss_mask": case["loss_mask"],
        "normalizers": NORMALIZERS,
        "teacher_hidden": case["teacher_hidden"],
        "senses": case["senses"],
    }
    total, terms = head(hidden, **{**inputs, **changes})
    (3 * total).backward()
    return total.detach(), dict(zip(SUMS, terms.tolist(), strict=True)), hidden.grad, head.weight.grad


def run_plain(case, loss, *, trained_head=False, **options):
    """Returns what :func:`run_head` does, with the sums of CE, KL, hidden and sense term as a list."""
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_(trained_head)
    total, sums = plain_loss(case, loss, hidden, weight, NORMALIZERS, **options)
    (3 * total).backward()
    return total.detach(), [float(value.detach()) for value in sums], hidden.grad, weight.grad
