"""Both forms of the sense loss, against values by hand, and against values and gradients of plain loops by autograd."""

import math

import pytest
import torch
from random_tensors import random_float64
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from dskd.losses.sense_distance import sense_loss
from dskd.losses.sense_distribution import sense_divergence


def _gradient(function, values):
    values = values.clone().requires_grad_()
    total = function(values)
    total.backward()
    return total.detach(), values.grad


ROWS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [1.0, 1.0]])


def _sense(hidden, **changes):
    arguments = {
        "relation_positions": torch.tensor([1]),
        "synonym_rows": torch.tensor([[0, 1]]),
        "antonym_rows": torch.tensor([[2, 3]]),
        "own_positions": torch.tensor([0]),
        "own_rows": torch.tensor([[3, -1]]),
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
    assert sums.own.item() == pytest.approx(2.0)  # (3,1) to (1,1): 4 / 2, and padding is not a row
    assert sums.total.item() == pytest.approx(3.0 + 2.0 * 0.25 + 2.0)
    assert (sums.active_hinges.item(), sums.hinges.item()) == (1, 2)
    # By h each D has the gradient h - s. At 0: (2, 0). At 1: the mean of (0, 2) and (-2, 2), less (-1, 1).
    torch.testing.assert_close(gradient, 1 + 10 * torch.tensor([[2.0, 0.0], [-1.0 + 1.0, 2.0 - 1.0]]))


def test_with_zero_weights_of_synonyms_and_antonyms_only_own_senses_count():
    gradient = torch.zeros(2, 2)
    hidden = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    sums = _sense(hidden, synonym_weight=0.0, antonym_weight=0.0, gradient=gradient)
    assert sums.total.item() == sums.own.item() == pytest.approx(2.0)
    torch.testing.assert_close(gradient, torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_a_position_without_antonyms_has_no_hinge():
    sums = _sense(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), antonym_rows=torch.tensor([[-1, -1]]))
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
        synonym_rows=none,
        antonym_rows=none,
        own_positions=empty,
        own_rows=none,
        margin=1.0,
        antonym_weight=1.0,
        gradient=gradient,
    )
    assert sums.total.item() == 0
    assert gradient.abs().sum() == 0


def test_moving_away_from_an_antonym_lowers_the_loss_only_within_the_margin():
    def antonym_term(distance):
        hidden = torch.tensor([[0.0, 0.0], [distance, 0.0]])
        return _sense(hidden, antonym_rows=torch.tensor([[0, -1]])).antonym.item()

    assert antonym_term(0.5) > antonym_term(1.0) > antonym_term(1.7)
    assert antonym_term(1.8) == 0  # 1.8² / 2 > 1.5


@pytest.mark.parametrize("at_one_time", [None, 1, 12])
def test_sense_loss_and_gradient_are_those_of_loops_however_many_rows_are_gathered(monkeypatch, at_one_time):
    if at_one_time:
        monkeypatch.setattr("dskd.losses.sense_distance._GATHERED", {"cpu": at_one_time})
    generator = torch.Generator().manual_seed(2)
    hidden, rows = random_float64(9, 5, seed=4), random_float64(6, 5, seed=5)
    index = torch.randint(-1, 6, (3, 7, 4), generator=generator)
    at = {name: torch.randperm(9, generator=generator)[:7] for name in ("relation_positions", "own_positions")}
    names = ("synonym_rows", "antonym_rows", "own_rows")

    def plain(states):
        total = 0
        groups = zip(names, ("relation_positions", "relation_positions", "own_positions"), (0.4, -1, 1), strict=True)
        for (_, where, sign), places in zip(groups, index, strict=True):
            for position, named in zip(at[where].tolist(), places.tolist(), strict=True):
                distances = [F.mse_loss(states[position], rows[row]) for row in named if row >= 0]
                terms = distances if sign > 0 else [0.7 * (3.0 - distance).clamp(min=0) for distance in distances]
                terms = [abs(sign) * term for term in terms]
                total = total + sum(terms) / max(len(terms), 1)
        return total

    expected, expected_gradient = _gradient(plain, hidden)
    gradient = torch.zeros_like(hidden)
    indices = dict(zip(names, index, strict=True))
    sums = sense_loss(
        hidden, rows, **at, **indices, margin=3.0, antonym_weight=0.7, synonym_weight=0.4, gradient=gradient
    )
    torch.testing.assert_close(sums.total, expected)
    torch.testing.assert_close(gradient, expected_gradient)


N, D, R, POSITIONS, CANDIDATES, TAU = 9, 5, 12, 6, 7, 0.3
# Each position has rows of its own, one has none, and all positions share some more.
INDEX = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:CANDIDATES] for i in range(6)])
INDEX[0, 4:], INDEX[1], INDEX[2, [0, 3]] = -1, -1, -1
SHARED = torch.tensor([9, 10, 11])


def _divergence(hidden, teacher, rows, **changes):
    arguments = {
        "positions": torch.tensor([7, 2, 0, 8, 3, 5]),
        "candidate_rows": INDEX,
        "random_rows": SHARED,
        "temperature": TAU,
        "distance": "squared",
    }
    return sense_divergence(hidden, rows, teacher_hidden=teacher, **{**arguments, **changes})


def _plain_divergence(hidden, teacher, rows, distance, shared):
    """Computes it position by position, over lists of rows, with torch's own distances and distributions."""
    total, entropy = 0, 0
    for position, named in zip([7, 2, 0, 8, 3, 5], INDEX.tolist(), strict=True):
        candidates = rows[[row for row in named if row >= 0] + shared]
        if not len(candidates):
            continue
        far = {
            "squared": lambda h, c=candidates: (h - c).square().mean(-1),
            "cosine": lambda h, c=candidates: 1 - F.cosine_similarity(h.expand_as(c), c, dim=-1),
        }[distance]
        q, p = (Categorical(logits=-far(states[position]) / TAU) for states in (hidden, teacher))
        total, entropy = total + kl_divergence(p, q), entropy + p.entropy()
    return total, entropy


def test_sense_divergence_by_hand():
    # To (0,0) the student is as near as to (2,0) and the teacher is not: D is 1/2 and 1/2; 0 and 2.
    hidden, teacher, rows = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0], [2.0, 0]])
    gradient = torch.ones(1, 2)
    sums = sense_divergence(
        hidden,
        rows,
        teacher_hidden=teacher,
        positions=torch.tensor([0]),
        candidate_rows=torch.tensor([[1, -1]]),
        random_rows=torch.tensor([0]),
        temperature=0.5,
        distance="squared",
        gradient=gradient,
        scale=10.0,
    )
    p = 1 / (1 + math.exp(-4))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert sums.total.item() == pytest.approx(math.log(2) - entropy)
    assert sums.teacher_entropy.item() == pytest.approx(entropy)
    # By -D / tau: 1/2 - p and 1/2 - (1 - p); of which each is moved by (s - h) · 2 / (D tau) = 2 (s - h).
    expected = 2 * ((0.5 - p) * -1 + (0.5 - (1 - p)) * 1)
    torch.testing.assert_close(gradient, torch.tensor([[1 + 10 * expected, 1.0]]))


@pytest.mark.parametrize("at_one_time", [None, 1, 90])
@pytest.mark.parametrize("shared", [[9, 10, 11], []], ids=["random", "no random"])
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_sense_divergence_and_gradient_are_those_of_loops_however_many_rows_are_gathered(
    monkeypatch, distance, shared, at_one_time
):
    if at_one_time:
        monkeypatch.setattr("dskd.losses.sense_distance._GATHERED", {"cpu": at_one_time})
    hidden, teacher, rows = random_float64(N, D, seed=1), random_float64(N, D, seed=2), random_float64(R, D, seed=3)
    expected, expected_gradient = _gradient(lambda h: _plain_divergence(h, teacher, rows, distance, shared)[0], hidden)
    gradient = torch.zeros_like(hidden)
    sums = _divergence(
        hidden,
        teacher,
        rows,
        distance=distance,
        random_rows=torch.tensor(shared, dtype=torch.int64),
        gradient=gradient,
        scale=0.7,
    )
    torch.testing.assert_close(sums.total, expected)
    torch.testing.assert_close(gradient, 0.7 * expected_gradient)
    torch.testing.assert_close(sums.teacher_entropy, _plain_divergence(hidden, teacher, rows, distance, shared)[1])


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_sense_divergence_is_zero_if_student_and_teacher_agree_and_positive_otherwise(distance):
    hidden, rows, gradient = (
        random_float64(N, D, seed=1),
        random_float64(R, D, seed=3),
        torch.zeros(N, D, dtype=torch.float64),
    )
    agreeing = _divergence(hidden, hidden.clone(), rows, distance=distance, gradient=gradient)
    assert agreeing.total.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    assert _divergence(hidden, hidden.flip(0), rows, distance=distance).total > 0.1


def test_lengths_change_nothing_in_the_cosine_form():
    hidden, teacher, rows = random_float64(N, D, seed=1), random_float64(N, D, seed=2), random_float64(R, D, seed=3)
    lengths = torch.arange(1.0, R + 1, dtype=torch.float64).unsqueeze(-1)
    plain, scaled = (
        _divergence(*inputs, distance="cosine").total
        for inputs in ((hidden, teacher, rows), (5 * hidden, 0.1 * teacher, rows * lengths))
    )
    torch.testing.assert_close(plain, scaled)
    squared = [_divergence(h, teacher, rows).total for h in (hidden, 5 * hidden)]
    assert abs(squared[0] - squared[1]) > 0.1


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_a_position_with_one_candidate_or_none_has_no_divergence(distance):
    hidden, teacher, rows = random_float64(N, D, seed=1), random_float64(N, D, seed=2), random_float64(R, D, seed=3)
    index = torch.full_like(INDEX, -1)
    index[:3, 1] = torch.tensor([4, 0, 2])
    gradient, nothing = torch.zeros_like(hidden), torch.empty(0, dtype=torch.int64)
    sums = _divergence(
        hidden, teacher, rows, candidate_rows=index, random_rows=nothing, distance=distance, gradient=gradient
    )
    assert sums.total.item() == pytest.approx(0, abs=1e-12)
    assert sums.teacher_entropy.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("rows", [0, 4])
def test_no_positions_give_no_divergence(rows):
    empty, gradient = torch.empty(0, dtype=torch.int64), torch.zeros(3, 2)
    sums = sense_divergence(
        torch.randn(3, 2),
        ROWS[:rows],
        teacher_hidden=torch.randn(3, 2),
        positions=empty,
        candidate_rows=torch.empty(0, 2, dtype=torch.int64),
        random_rows=empty,
        temperature=0.1,
        distance="squared",
        gradient=gradient,
    )
    assert sums.total.item() == 0
    assert gradient.abs().sum() == 0


def test_half_precision_states_are_compared_in_single_precision():
    hidden, teacher, rows = (random_float64(n, 64, seed=n).bfloat16() for n in (N, N + 1, R))
    gradient = torch.zeros_like(hidden)
    low = _divergence(hidden, teacher, rows, gradient=gradient).total
    high_gradient = torch.zeros(N, 64, dtype=torch.float64)
    high = _divergence(hidden.double(), teacher.double(), rows.double(), gradient=high_gradient).total
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(high.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), high_gradient, rtol=1e-2, atol=1e-4)
