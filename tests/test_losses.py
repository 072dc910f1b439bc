"""Values by hand or by another library; gradients by automatic differentiation of plain formulations in float64."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from dskd.losses import CachedTeacher, cached_divergence, cross_entropy, divergence, hidden_distance, sense_loss

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plain_divergence(student, teacher, temperature, kind):
    """From torch's own distributions."""
    q, p = Categorical(logits=student / temperature), Categorical(logits=teacher / temperature)
    if kind == "forward_kl":
        return kl_divergence(p, q).sum()
    if kind == "reverse_kl":
        return kl_divergence(q, p).sum()
    mixture = Categorical(probs=(q.probs + p.probs) / 2)
    return ((kl_divergence(p, mixture) + kl_divergence(q, mixture)) / 2).sum()


def _gradient(function, values):
    values = values.clone().requires_grad_()
    total = function(values)
    total.backward()
    return total.detach(), values.grad


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # probabilities 1/4, 3/4 and 4/5, 1/5
    total, gradient = cross_entropy(logits, torch.tensor([1, 1]))
    assert total.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5))
    torch.testing.assert_close(gradient, torch.tensor([[1 / 4, 3 / 4 - 1], [4 / 5, 1 / 5 - 1]]))


def test_cross_entropy_of_a_hopeless_label_is_finite():
    total, _ = cross_entropy(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
    assert total.item() == pytest.approx(500)


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
    total, _ = divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(9)]]), 2.0, kind)
    assert total.item() == pytest.approx(expected[kind], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_equals_is_zero_and_of_others_positive(kind):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    for same in (logits.clone(), logits + 5.0):  # a shift changes nothing
        total, gradient = divergence(logits, same, 2.0, kind)
        assert total.item() == pytest.approx(0, abs=1e-5)
        assert gradient.abs().max() < 1e-6
    assert divergence(logits, logits.flip(0), 1.0, kind)[0].item() > 0.1


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
    return CachedTeacher(top.indices, top.values, rest)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_vocabulary_cached_is_the_teacher_itself(kind):
    student, teacher = _random(2, 5, 13, seed=2) * 3
    torch.testing.assert_close(
        cached_divergence(student, _cached(teacher, 13), 2.0, kind), divergence(student, teacher, 2.0, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 4, 12])
def test_the_rest_of_a_cached_distribution_is_one_more_class(n, kind):
    """Both distributions lumped to n + 1 classes, by loops, and compared as such."""
    student, teacher = _random(2, 3, 13, seed=3) * 2
    cached = _cached(teacher, n)

    def plain(logits):
        total = 0
        for row, target, ids in zip(logits.softmax(-1), teacher.softmax(-1), cached.token_ids.tolist(), strict=True):
            others = [i for i in range(13) if i not in ids]
            q, p = (torch.cat([x[ids], x[others].sum().unsqueeze(0)]).log() for x in (row, target))
            total = total + _plain_divergence(q, p, 2.0, kind)
        return total

    torch.testing.assert_close(cached_divergence(student, cached, 2.0, kind), _gradient(plain, student))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_teacher_that_is_certain_gives_finite_gradients(kind):
    teacher = torch.zeros(1, 10)
    teacher[0, 3] = 60.0
    cached = CachedTeacher(*(part.half() if part.is_floating_point() else part for part in _cached(teacher, 2)))
    for student in (torch.zeros(1, 10), teacher):
        total, gradient = cached_divergence(student, cached, 2.0, kind)
        assert total.isfinite()
        assert gradient.isfinite().all()


def test_hidden_distance_by_hand():
    hidden, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    total, gradient = hidden_distance(hidden, teacher)
    assert total.item() == pytest.approx((4 + 2) / 2)
    assert gradient.tolist() == [[0.0, 2.0], [-1.0, -1.0]]


ROWS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [1.0, 1.0]])


def _sense(hidden, **changes):
    arguments = {
        "relation_positions": torch.tensor([1]),
        "synonym_index": torch.tensor([[0, 1]]),
        "antonym_index": torch.tensor([[2, 3]]),
        "own_positions": torch.tensor([0]),
        "own_index": torch.tensor([[3, -1]]),
        "margin": 1.5,
        "antonym_weight": 2.0,
    }
    return sense_loss(hidden, ROWS.to(hidden.dtype), **{**arguments, **changes})


def test_sense_loss_by_hand():
    gradient = torch.ones(2, 2)
    sums = _sense(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), gradient=gradient, scale=10.0)
    # D = |h - s|² / 2. To (0,0): 2, to (2,0): 4; to (0,4): 2, beyond the margin; to (1,1): 1, hinge 0.5.
    assert sums.synonym.item() == pytest.approx(3.0)
    assert sums.antonym.item() == pytest.approx(0.25)
    assert sums.own.item() == pytest.approx(2.0)  # (3,1) to (1,1): 4 / 2, and padding is no row
    assert sums.total.item() == pytest.approx(3.0 + 2.0 * 0.25 + 2.0)
    assert (sums.active_hinges.item(), sums.hinges.item()) == (1, 2)
    # By h each D has the gradient h - s. At 0: (2, 0). At 1: the mean of (0, 2) and (-2, 2), less (-1, 1).
    torch.testing.assert_close(gradient, 1 + 10 * torch.tensor([[2.0, 0.0], [-1.0 + 1.0, 2.0 - 1.0]]))


def test_a_position_without_antonyms_has_no_hinge():
    sums = _sense(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), antonym_index=torch.tensor([[-1, -1]]))
    assert sums.antonym.item() == 0
    assert sums.hinges.item() == 0


@pytest.mark.parametrize("rows", [0, 4])
def test_no_positions_give_zero(rows):
    empty, none = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
    gradient = torch.zeros(3, 2)
    sums = sense_loss(
        torch.randn(3, 2),
        ROWS[:rows],
        relation_positions=empty,
        synonym_index=none,
        antonym_index=none,
        own_positions=empty,
        own_index=none,
        margin=1.0,
        antonym_weight=1.0,
        gradient=gradient,
    )
    assert sums.total.item() == 0
    assert gradient.abs().sum() == 0


def test_moving_away_from_an_antonym_lowers_the_loss_only_within_the_margin():
    def antonym_term(distance):
        hidden = torch.tensor([[0.0, 0.0], [distance, 0.0]])
        return _sense(hidden, antonym_index=torch.tensor([[0, -1]])).antonym.item()

    assert antonym_term(0.5) > antonym_term(1.0) > antonym_term(1.7)
    assert antonym_term(1.8) == 0  # 1.8² / 2 > 1.5


@pytest.mark.parametrize("at_one_time", [None, 1, 12])
def test_sense_loss_and_gradient_are_those_of_loops_however_many_rows_are_gathered(monkeypatch, at_one_time):
    if at_one_time:
        monkeypatch.setattr("dskd.losses._GATHERED", {"cpu": at_one_time})
    generator = torch.Generator().manual_seed(2)
    hidden, rows = _random(9, 5, seed=4), _random(6, 5, seed=5)
    index = torch.randint(-1, 6, (3, 7, 4), generator=generator)
    at = {name: torch.randperm(9, generator=generator)[:7] for name in ("relation_positions", "own_positions")}
    names = ("synonym_index", "antonym_index", "own_index")

    def plain(states):
        total = 0
        groups = zip(names, ("relation_positions", "relation_positions", "own_positions"), (1, -1, 1), strict=True)
        for (_, where, sign), places in zip(groups, index, strict=True):
            for position, named in zip(at[where].tolist(), places.tolist(), strict=True):
                distances = [F.mse_loss(states[position], rows[row]) for row in named if row >= 0]
                terms = distances if sign == 1 else [0.7 * (3.0 - distance).clamp(min=0) for distance in distances]
                total = total + sum(terms) / max(len(terms), 1)
        return total

    expected, expected_gradient = _gradient(plain, hidden)
    gradient = torch.zeros_like(hidden)
    indices = dict(zip(names, index, strict=True))
    sums = sense_loss(hidden, rows, **at, **indices, margin=3.0, antonym_weight=0.7, gradient=gradient)
    torch.testing.assert_close(sums.total, expected)
    torch.testing.assert_close(gradient, expected_gradient)
