"""Losses, against values by hand or by another library, and gradients of plain formulations by autograd in float64."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from dskd.losses.logits import cached_divergence, cross_entropy, divergence, hidden_distance
from dskd.models.readouts import TopTokens

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plain_divergence(student, teacher, temperature, kind):
    """Computes the divergence with torch's own distributions."""
    q, p = Categorical(logits=student / temperature), Categorical(logits=teacher / temperature)
    if kind == "forward_kl":
        return kl_divergence(p, q)
    if kind == "reverse_kl":
        return kl_divergence(q, p)
    mixture = Categorical(probs=(q.probs + p.probs) / 2)
    return (kl_divergence(p, mixture) + kl_divergence(q, mixture)) / 2


def _gradient(function, values):
    values = values.clone().requires_grad_()
    found = function(values)
    found.sum().backward()
    return found.detach(), values.grad


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # probabilities 1/4, 3/4 and 4/5, 1/5
    values, gradient = cross_entropy(logits, torch.tensor([1, 1]))
    assert values.tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 5)])
    torch.testing.assert_close(gradient, torch.tensor([[1 / 4, 3 / 4 - 1], [4 / 5, 1 / 5 - 1]]))


def test_cross_entropy_of_a_hopeless_label_is_finite():
    values, _ = cross_entropy(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
    assert values.item() == pytest.approx(500)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_by_hand(kind):
    # At T = 2 a logit of log 9 counts as log 3: student 1/2, 1/2; teacher 1/4, 3/4; mixture 3/8, 5/8.
    expected = {
        "forward_kl": math.log(0.25 / 0.5) / 4 + 3 * math.log(0.75 / 0.5) / 4,
        "reverse_kl": math.log(0.5 / 0.25) / 2 + math.log(0.5 / 0.75) / 2,
        "jensen_shannon": (
            math.log(0.25 / 0.375) / 4
            + 3 * math.log(0.75 / 0.625) / 4
            + math.log(0.5 / 0.375) / 2
            + math.log(0.5 / 0.625) / 2
        )
        / 2,
    }
    values, _ = divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(9)]]), 2.0, kind)
    assert values.item() == pytest.approx(expected[kind], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_equals_is_zero_and_of_others_positive(kind):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    for same in (logits.clone(), logits + 5.0):  # a shift changes nothing
        values, gradient = divergence(logits, same, 2.0, kind)
        assert values.tolist() == pytest.approx([0] * 7, abs=1e-5)
        assert gradient.abs().max() < 1e-6
    assert divergence(logits, logits.flip(0), 1.0, kind)[0].sum().item() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_and_gradients_are_those_of_torch_distributions(kind, temperature):
    student, teacher = _random(2, 5, 13, seed=1)
    expected = _gradient(lambda x: _plain_divergence(x, teacher, temperature, kind), student)
    found = divergence(student, teacher, temperature, kind)
    torch.testing.assert_close(found, expected)


def _cached(logits, n):
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(n, dim=-1)
    rest = torch.stack(
        [
            row[[i for i in range(len(row)) if i not in ids]].logsumexp(-1)
            for row, ids in zip(logprobs, top.indices.tolist(), strict=True)
        ]
    )
    return TopTokens(top.indices, top.values, rest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_teacher_of_the_whole_vocabulary_equals_the_teacher(kind):
    student, teacher = _random(2, 5, 13, seed=2) * 3
    torch.testing.assert_close(
        cached_divergence(student, _cached(teacher, 13), 2.0, kind), divergence(student, teacher, 2.0, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 4, 12])
def test_the_rest_of_a_cached_distribution_is_one_more_class(n, kind):
    """Compares with loops that sum both distributions into n + 1 classes."""
    student, teacher = _random(2, 3, 13, seed=3) * 2
    cached = _cached(teacher, n)

    def plain(logits):
        values = []
        for row, target, ids in zip(logits.softmax(-1), teacher.softmax(-1), cached.token_ids.tolist(), strict=True):
            others = [i for i in range(13) if i not in ids]
            q, p = (torch.cat([x[ids], x[others].sum().unsqueeze(0)]).log() for x in (row, target))
            values.append(_plain_divergence(q, p, 2.0, kind))
        return torch.stack(values)

    torch.testing.assert_close(cached_divergence(student, cached, 2.0, kind), _gradient(plain, student))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_teacher_that_is_certain_gives_finite_gradients(kind):
    teacher = torch.zeros(1, 10)
    teacher[0, 3] = 60.0
    cached = TopTokens(*(part.half() if part.is_floating_point() else part for part in _cached(teacher, 2)))
    for student in (torch.zeros(1, 10), teacher):
        values, gradient = cached_divergence(student, cached, 2.0, kind)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


def test_hidden_distance_by_hand():
    hidden, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    total, gradient = hidden_distance(hidden, teacher)
    assert total.item() == pytest.approx((4 + 2) / 2)
    assert gradient.tolist() == [[0.0, 2.0], [-1.0, -1.0]]
