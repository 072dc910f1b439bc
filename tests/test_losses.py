import math

import pytest
import torch

from dskd.losses import cross_entropy_sum, hidden_distance_sum, kl_divergence_sum, sense_sums


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # probabilities 1/4, 3/4 and 4/5, 1/5
    assert cross_entropy_sum(logits, torch.tensor([1, 1])).item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5))


def test_kl_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence_sum(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_kl_at_a_temperature_by_hand():
    # At T = 2 a logit of log 9 counts as log 3.
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(9)]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence_sum(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-6)


def test_kl_of_equals_is_zero_and_of_others_positive():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    assert kl_divergence_sum(logits, logits.clone(), 2.0).item() == pytest.approx(0, abs=1e-6)
    assert kl_divergence_sum(logits, logits + 5.0).item() == pytest.approx(0, abs=1e-5)  # a shift changes nothing
    assert kl_divergence_sum(logits, logits.flip(0)).item() > 0.1


def test_kl_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 5, 13, generator=generator)
    from torch.distributions import Categorical, kl_divergence

    expected = kl_divergence(Categorical(logits=teacher / 1.7), Categorical(logits=student / 1.7)).sum()
    torch.testing.assert_close(kl_divergence_sum(student, teacher, 1.7), expected)


def test_hidden_distance_by_hand():
    hidden, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert hidden_distance_sum(hidden, teacher).item() == pytest.approx((4 + 2) / 2)


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
    return sense_sums(hidden, ROWS.to(hidden.dtype), **{**arguments, **changes})


def test_sense_loss_by_hand():
    hidden = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    sums = _sense(hidden)
    # D = |h - s|² / 2. To (0,0): 2, to (2,0): 4; to (0,4): 2, beyond the margin; to (1,1): 1, hinge 0.5.
    assert sums.synonym.item() == pytest.approx(3.0)
    assert sums.antonym.item() == pytest.approx(0.25)
    assert sums.own.item() == pytest.approx(2.0)  # (3,1) to (1,1): 4 / 2, and padding is no row
    assert sums.total.item() == pytest.approx(3.0 + 2.0 * 0.25 + 2.0)
    assert (sums.active_hinges.item(), sums.hinges.item()) == (1, 2)


def test_a_position_without_antonyms_has_no_hinge():
    sums = _sense(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), antonym_index=torch.tensor([[-1, -1]]))
    assert sums.antonym.item() == 0
    assert sums.hinges.item() == 0


def test_no_positions_give_zero_with_a_gradient():
    hidden = torch.randn(3, 2, requires_grad=True)
    empty, none = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
    sums = _sense(
        hidden, relation_positions=empty, synonym_index=none, antonym_index=none, own_positions=empty, own_index=none
    )
    sums.total.backward()
    assert sums.total.item() == 0
    assert hidden.grad.abs().sum() == 0


def test_moving_away_from_an_antonym_lowers_the_loss_only_within_the_margin():
    def antonym_term(distance):
        hidden = torch.tensor([[0.0, 0.0], [distance, 0.0]])
        return _sense(hidden, antonym_index=torch.tensor([[0, -1]])).antonym.item()

    assert antonym_term(0.5) > antonym_term(1.0) > antonym_term(1.7)
    assert antonym_term(1.8) == 0  # 1.8² / 2 > 1.5


@pytest.mark.parametrize("term", ["ce", "kl", "hidden", "sense"])
def test_gradients_are_those_of_finite_differences(term):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    rows = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    functions = {
        "ce": lambda x: cross_entropy_sum(x, torch.tensor([0, 4, 2, 2])),
        "kl": lambda x: kl_divergence_sum(x, teacher, 2.0),
        "hidden": lambda x: hidden_distance_sum(x, teacher),
        "sense": lambda x: (
            sense_sums(
                x,
                rows,
                relation_positions=torch.tensor([0, 2]),
                synonym_index=torch.tensor([[0, 1], [2, -1]]),
                antonym_index=torch.tensor([[3, 4], [-1, -1]]),
                own_positions=torch.tensor([1, 2]),
                own_index=torch.tensor([[5, -1], [0, 3]]),
                margin=3.0,
                antonym_weight=0.7,
            ).total
        ),
    }
    assert torch.autograd.gradcheck(functions[term], (values,))
