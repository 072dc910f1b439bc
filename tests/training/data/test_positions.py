import numpy as np
import pytest
import torch
from shard_samples import T, make_sample

from dskd.random_numbers import random_bits
from dskd.training.data.positions import SensePositions, TargetPositions, _lowest, draw_share


@pytest.mark.parametrize(
    ("share", "minimum", "expected"), [(0.5, 0, 6), (0.5, 8, 8), (0.5, 99, 11), (0.0, 0, 0), (1.0, 0, 11)]
)
def test_the_share_of_lexical_positions_is_drawn(share, minimum, expected):
    sample = make_sample()  # lexical: 2 to 13 without the masked 3, eleven positions
    relation, own = SensePositions(1, share, minimum).draw(sample, 4, 0)
    assert len(relation) == len(own) == expected
    assert set(relation) <= set(range(2, 14)) - {3}
    assert set(own) <= set(range(18)) - {3}


def test_positions_are_a_function_of_seed_epoch_and_sample():
    sample, rule = make_sample(), SensePositions(1, 0.5, 0)
    drawn = rule.draw(sample, 4, 0)
    assert all((a == b).all() for a, b in zip(drawn, rule.draw(sample, 4, 0), strict=True))
    for other in (rule.draw(sample, 5, 0), rule.draw(sample, 4, 1), SensePositions(2, 0.5, 0).draw(sample, 4, 0)):
        assert any(set(a) != set(b) for a, b in zip(drawn, other, strict=True))


def test_every_lexical_position_is_drawn_equally_often():
    sample, rule = make_sample(), SensePositions(1, 0.5, 0)
    counts = np.zeros(T)
    for epoch in range(600):
        counts[rule.draw(sample, 4, epoch)[0]] += 1
    lexical = counts[[p for p in range(2, 14) if p != 3]]
    expected = 600 * 6 / 11
    assert abs(lexical - expected).max() < 6 * np.sqrt(expected * (1 - 6 / 11))


def test_priorities_of_positions_do_not_repeat():
    assert len(random_bits(0, 0, 0, 1, torch.arange(1000)).unique()) == 1000


@pytest.mark.parametrize(("share", "minimum"), [(0.5, 0), (0.3, 4), (0.0, 0), (1.0, 0)])
def test_the_positions_of_each_sample_are_those_with_the_lowest_priorities(share, minimum):
    samples = [{**make_sample(number), "sample_id": 7 * number + 1, "epoch": number} for number in range(4)]
    rule = SensePositions(3, share, minimum)
    for sample, drawn in zip(samples, rule.draw_each(samples), strict=True):
        counted = sample["loss_mask"].astype(bool)
        relation = (sample["synonym_ids"][:, 0] >= 0) | (sample["antonym_ids"][:, 0] >= 0)
        number = rule.number(int((counted & relation).sum()))
        for draw, (mask, found) in enumerate(zip((relation, sample["sense_ids"][:, 0] >= 0), drawn, strict=True)):
            priority = {
                int(position): int(random_bits(3, draw, sample["epoch"], sample["sample_id"], int(position)))
                for position in np.flatnonzero(counted & mask)
            }
            assert found.tolist() == sorted(sorted(priority, key=priority.__getitem__)[:number])


def test_of_equal_priorities_the_first_positions_are_drawn():
    priorities = np.array([9, 5, 0, 5, 1, 5, 5])
    positions = np.array([0, 1, 3, 4, 5, 6])
    drawn = [_lowest(positions, priorities, count).tolist() for count in range(7)]
    assert drawn == [[], [4], [1, 4], [1, 3, 4], [1, 3, 4, 5], [1, 3, 4, 5, 6], [0, 1, 3, 4, 5, 6]]


@pytest.mark.parametrize(("number", "share"), [(17, 0.35), (20, 0.5), (4, 0.35), (2, 0.35), (1, 0.35), (17, 1.0)])
def test_every_target_is_drawn_with_the_same_probability_and_a_sample_always_has_one(number, share):
    draws = 4000
    counted = np.zeros((draws, T), bool)
    counted[:, random_places(number)] = True
    drawn = draw_share(counted, share, 1, torch.arange(draws))
    assert not (drawn & ~counted).any()
    expected = max(share * number, 1)  # of a sample, on average
    assert set(drawn.sum(1)) <= {int(np.floor(expected)), int(np.ceil(expected))}
    probability = expected / number
    frequencies = drawn[:, counted[0]].mean(0)
    assert abs(frequencies - probability).max() <= 5 * np.sqrt(probability * (1 - probability) / draws)
    assert abs(drawn.sum(1).mean() - expected) <= 5 * 0.5 / np.sqrt(draws)


def random_places(number):
    """Returns `number` of the T positions."""
    return np.random.default_rng(number).permutation(T)[:number]


def test_the_mean_over_drawn_positions_is_on_average_that_over_all():
    """A step of samples of different lengths, in which longer samples have higher values."""
    counted = np.arange(T) < np.array([20, 11, 6, 16])[:, None]
    values = np.random.default_rng(0).normal(size=(4, T)) + counted.sum(1, keepdims=True)
    draws = 2000
    epochs, samples = torch.arange(draws).repeat_interleave(4), torch.arange(4).repeat(draws)
    drawn = draw_share(np.tile(counted, (draws, 1)), 0.35, 1, epochs, samples).reshape(draws, 4, T)
    means = (drawn * values).sum((1, 2)) / drawn.sum((1, 2))
    assert means.mean() == pytest.approx(values[counted].mean(), abs=4 * means.std() / np.sqrt(draws))
    assert means.std() / np.sqrt(draws) < 0.02  # the samples' own means differ by up to 14


def test_drawn_targets_are_a_function_of_seed_epoch_and_sample():
    samples = [make_sample(number, sample_id=number) for number in range(6)]
    rule = TargetPositions(1, 0.4)
    drawn = rule.draw_each(samples)
    for sample, of_sample in zip(samples, drawn, strict=True):
        assert (rule.draw_each([sample]) == of_sample).all()  # whatever else is in the step
    for other in (
        TargetPositions(2, 0.4).draw_each(samples),
        rule.draw_each([{**sample, "epoch": 1} for sample in samples]),
        rule.draw_each([{**sample, "sample_id": 9} for sample in samples]),
    ):
        assert (other != drawn).any(1).sum() >= 5
    nothing = {**samples[0], "loss_mask": np.zeros(T, np.uint8)}
    assert not rule.draw_each([nothing]).any()
