"""Losses, against values by hand or by another library, and gradients of plain formulations by autograd in float64."""

import math

import pytest
import torch
from random_tensors import random_float64
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from dskd.losses.logits import divergence, hidden_distance, logit_losses
from dskd.models.running.readouts import TopTokens

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]
ZERO, ONE = torch.zeros(1, 1), torch.ones(1, 1)


def cross_entropy(logits, labels):
    losses = logit_losses(logits, labels, None, ce_scale=ONE.expand(len(logits), 1), kl_scale=ZERO)
    return losses.ce, losses.gradient


def cached_divergence(logits, teacher, temperature, kind):
    """Returns the divergence at each position, and the gradient of its sum alone."""
    labels = torch.zeros(len(logits), dtype=torch.int64)
    scales = {"ce_scale": ZERO.expand(len(logits), 1).to(logits.dtype), "kl_scale": ONE.to(logits.dtype)}
    losses = logit_losses(logits, labels, teacher, **scales, temperature=temperature, kind=kind)
    return losses.kl, losses.gradient


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
    student, teacher = random_float64(2, 5, 13, seed=1)
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
    student, teacher = random_float64(2, 5, 13, seed=2) * 3
    torch.testing.assert_close(
        cached_divergence(student, _cached(teacher, 13), 2.0, kind), divergence(student, teacher, 2.0, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 4, 12])
def test_the_rest_of_a_cached_distribution_is_one_more_class(n, kind):
    """Compares with loops that sum both distributions into n + 1 classes."""
    student, teacher = random_float64(2, 3, 13, seed=3) * 2
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


def _weighted_sum(student, labels, teacher, ce_scale, kl_scale, temperature, kind):
    """Returns CE and KL [N] and the gradient of their weighted sum, by torch's functions and autograd in float64."""
    logits, teacher = student.double().requires_grad_(), teacher.double()
    ce = F.cross_entropy(logits, labels, reduction="none")
    shared = min(logits.shape[-1], teacher.shape[-1])
    log_q, log_p = ((z[:, :shared] / temperature).log_softmax(-1) for z in (logits, teacher))
    if kind == "jensen_shannon":
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        kl = sum(F.kl_div(log_m, z, log_target=True, reduction="none").sum(-1) for z in (log_q, log_p)) / 2
    else:
        of, to = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
        kl = F.kl_div(to, of, log_target=True, reduction="none").sum(-1)
    (ce_scale.double().squeeze(-1) * ce + kl_scale.double().squeeze(-1) * kl).sum().backward()
    return ce.detach(), kl.detach(), logits.grad


def _scales(count, dtype):
    return (random_float64(count, 1, seed=4).abs() + 0.1).to(dtype), (random_float64(count, 1, seed=5).abs() + 0.1).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(40, 40), (43, 40), (40, 43)], ids=["same", "padded student", "padded teacher"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_the_gradient_of_the_weighted_sum_are_those_of_torch(kind, temperature, sizes, dtype):
    count, exact = 9, torch.float64 if dtype == torch.float64 else torch.float32
    student, teacher = (random_float64(count, size, seed=size + i).mul(4).to(dtype) for i, size in enumerate(sizes))
    labels, scales = torch.arange(count) * 5 % min(sizes), _scales(count, exact)
    found = logit_losses(
        student, labels, teacher, ce_scale=scales[0], kl_scale=scales[1], temperature=temperature, kind=kind
    )
    expected = _weighted_sum(student, labels, teacher, *scales, temperature, kind)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert {part.dtype for part in found} == {exact}
    torch.testing.assert_close(tuple(part.double() for part in found), expected, **tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_far_apart_overflow_nowhere(kind, temperature):
    student, teacher = torch.randn(2, 6, 30, generator=torch.Generator().manual_seed(6)) * 1e4
    labels, scales = torch.arange(6), _scales(6, torch.float32)
    found = logit_losses(
        student, labels, teacher, ce_scale=scales[0], kl_scale=scales[1], temperature=temperature, kind=kind
    )
    expected = _weighted_sum(student, labels, teacher, *scales, temperature, kind)
    torch.testing.assert_close(tuple(part.double() for part in found), expected, rtol=1e-5, atol=1e-3)


def test_tokens_that_the_student_excludes_have_no_gradient():
    student, teacher = random_float64(2, 4, 10, seed=7)
    student[:, 3] = -torch.inf
    found = logit_losses(student, torch.arange(3, 7), None, ce_scale=torch.ones(4, 1).double(), kl_scale=ZERO)
    assert found.ce[0] == torch.inf
    expected = _gradient(lambda x: F.cross_entropy(x, torch.arange(3, 7), reduction="none"), student)
    torch.testing.assert_close((found.ce, found.gradient), expected, rtol=1e-12, atol=1e-12)
    values, gradient = divergence(student, teacher, 2.0, "forward_kl")
    assert (values == torch.inf).all()  # the teacher does not exclude it
    torch.testing.assert_close(gradient, (student / 2).softmax(-1) / 2 - (teacher / 2).softmax(-1) / 2)


@pytest.mark.parametrize("teacher", ["none", "logits", "top tokens"])
def test_no_positions_give_no_losses(teacher):
    teachers = {
        "none": None,
        "logits": torch.empty(0, 10),
        "top tokens": TopTokens(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), torch.empty(0)),
    }
    none = torch.empty(0, 1)
    found = logit_losses(
        torch.empty(0, 10), torch.empty(0, dtype=torch.int64), teachers[teacher], ce_scale=none, kl_scale=none
    )
    assert [tuple(part.shape) for part in found] == [(0,), (0,), (0, 10)]


@pytest.mark.parametrize("n", [1, 4, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_sum_with_a_cached_teacher_adds_up_its_two_gradients(kind, n):
    student, teacher = random_float64(2, 5, 13, seed=8) * 3
    cached, labels, (ce_scale, kl_scale) = _cached(teacher, n), torch.arange(5) * 3, _scales(5, torch.float64)
    found = logit_losses(student, labels, cached, ce_scale=ce_scale, kl_scale=kl_scale, temperature=2.0, kind=kind)
    ce, of_ce = _gradient(lambda x: F.cross_entropy(x, labels, reduction="none"), student)
    kl, of_kl = cached_divergence(student, cached, 2.0, kind)
    torch.testing.assert_close(found, (ce, kl, ce_scale * of_ce + kl_scale * of_kl), rtol=1e-12, atol=1e-12)


def test_the_rest_of_a_student_that_is_certain_keeps_its_digits():
    """In float32, 1 minus the probability of the known tokens would be 0."""
    student = torch.zeros(1, 10)
    student[0, 3] = 200.0
    cached = _cached(torch.zeros(1, 10).index_fill(1, torch.tensor([3]), 1.0), 1)
    values, gradient = cached_divergence(student, cached, 1.0, "forward_kl")
    p = torch.tensor([math.e / (math.e + 9), 9 / (math.e + 9)])
    expected = (p * p.log()).sum() - p[1] * (math.log(9) - 200)
    assert values.item() == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(gradient[0, :3], -p[1:].expand(3) / 9)


def test_hidden_distance_by_hand():
    hidden, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    total, gradient = hidden_distance(hidden, teacher)
    assert total.item() == pytest.approx((4 + 2) / 2)
    assert gradient.tolist() == [[0.0, 2.0], [-1.0, -1.0]]
