"""The chunked head against the plain formulation, with whole logits and autograd, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dskd.config import LossConfig
from dskd.head import TERMS, DistillationHead, Normalizers

B, T, D, D_TEACHER, V, R, K = 2, 6, 5, 7, 11, 4, 2


@pytest.fixture
def case():
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
            "synonym_index": torch.tensor([[0, 1], [2, -1]]),
            "antonym_index": torch.tensor([[3, -1], [-1, -1]]),
            "own_positions": torch.tensor([2, 3, 9]),
            "own_index": torch.tensor([[0, -1], [1, 2], [3, 0]]),
        },
    }


def _plain(case, loss, hidden, weight, normalizers):
    """L as method.md section 4 has it, in one expression each, with loops for the senses."""
    mask = case["loss_mask"]
    logits, teacher = hidden @ weight.T, case["teacher_hidden"] @ case["teacher_weight"].T
    ce = F.cross_entropy(logits[mask], case["labels"][mask], reduction="sum")
    p = (teacher / loss.temperature).softmax(-1)
    kl = (p * (p.log() - (logits / loss.temperature).log_softmax(-1))).sum(-1)[mask].sum()
    distance = ((hidden - case["teacher_hidden"]) ** 2).mean(-1)[mask].sum()
    senses, flat = case["senses"], hidden.reshape(-1, D)
    total = 0
    for position, near, far in zip(
        senses["relation_positions"], senses["synonym_index"], senses["antonym_index"], strict=True
    ):
        pulls = [((flat[position] - senses["sense_rows"][row]) ** 2).mean() for row in near if row >= 0]
        pushes = [
            (loss.margin - ((flat[position] - senses["sense_rows"][row]) ** 2).mean()).clamp(min=0)
            for row in far
            if row >= 0
        ]
        total = total + sum(pulls) / len(pulls) + (loss.antonym_weight * sum(pushes) / len(pushes) if pushes else 0)
    for position, rows in zip(senses["own_positions"], senses["own_index"], strict=True):
        pulls = [((flat[position] - senses["sense_rows"][row]) ** 2).mean() for row in rows if row >= 0]
        total = total + sum(pulls) / len(pulls)
    return (
        normalizers.tokens
        * (loss.ce_weight * ce + loss.kd_weight * loss.temperature**2 * kl + loss.hidden_weight * distance)
        + normalizers.senses * loss.sense_weight * total,
        (ce, kl, distance, total),
    )


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("trained_head", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_formulation(case, chunk_size, trained_head):
    loss = LossConfig(ce_weight=0.9, kd_weight=0.7, sense_weight=1.3, hidden_weight=0.4, margin=2.0, antonym_weight=0.6)
    normalizers = Normalizers(tokens=0.25, senses=0.5)
    hidden = case["hidden"].clone().requires_grad_()
    weight = nn.Parameter(case["weight"].clone(), requires_grad=trained_head)
    head = DistillationHead(weight, case["teacher_weight"], loss, chunk_size=chunk_size)
    total, terms = head(
        hidden,
        labels=case["labels"],
        loss_mask=case["loss_mask"],
        normalizers=normalizers,
        teacher_hidden=case["teacher_hidden"],
        senses=case["senses"],
    )
    (3 * total).backward()

    plain_hidden = case["hidden"].clone().requires_grad_()
    plain_weight = case["weight"].clone().requires_grad_()
    plain, sums = _plain(case, loss, plain_hidden, plain_weight, normalizers)
    (3 * plain).backward()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(hidden.grad, plain_hidden.grad)
    if trained_head:
        torch.testing.assert_close(weight.grad, plain_weight.grad)
    else:
        assert weight.grad is None
    reported = dict(zip(TERMS, terms.tolist(), strict=True))
    for name, value in zip(("ce", "kl", "hidden", "sense"), sums, strict=True):
        assert reported[name] == pytest.approx(float(value.detach()), rel=1e-5)


def test_a_batch_in_which_nothing_counts_still_has_a_gradient(case):
    # Under ZeRO-3 a rank without a gradient would leave the others waiting.
    hidden = case["hidden"].clone().requires_grad_()
    head = DistillationHead(nn.Parameter(case["weight"]), case["teacher_weight"], LossConfig(), chunk_size=4)
    total, _ = head(
        hidden,
        labels=case["labels"],
        loss_mask=torch.zeros(B, T, dtype=torch.bool),
        normalizers=Normalizers(1.0, 1.0),
        teacher_hidden=case["teacher_hidden"],
    )
    total.backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


def test_a_teacher_of_another_width_is_fine_without_a_hidden_state_term(case):
    head = DistillationHead(
        nn.Parameter(case["weight"]), torch.randn(V, D_TEACHER, dtype=torch.float64), LossConfig(), chunk_size=4
    )
    total, _ = head(
        case["hidden"],
        labels=case["labels"],
        loss_mask=case["loss_mask"],
        normalizers=Normalizers(1.0, 1.0),
        teacher_hidden=torch.randn(B, T, D_TEACHER, dtype=torch.float64),
    )
    assert torch.isfinite(total)


def test_without_labels_the_head_gives_logits(case):
    head = DistillationHead(nn.Parameter(case["weight"]), None, LossConfig(), chunk_size=4)
    torch.testing.assert_close(head(case["hidden"]), case["hidden"] @ case["weight"].T)
