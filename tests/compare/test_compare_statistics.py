"""Intervals and tests against scipy, values computed by hand, and their definitions."""

import math

import numpy as np
import pytest
from scipy import stats

from dskd.compare.statistics import Estimate, holm, on_seeds, paired_on_examples


def test_the_interval_over_seeds_is_students():
    found = Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(
        4.302653 / math.sqrt(3), rel=1e-6
    )  # t of 2 degrees of freedom, by the table
    assert Estimate.of([4.0]) == Estimate(4.0, None)


def test_with_one_score_an_example_it_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    one, other = generator.binomial(1, 0.7, 200), generator.binomial(1, 0.6, 200)
    found, expected = paired_on_examples(one, other, np.ones(200)), stats.ttest_rel(one, other)
    assert found.value == pytest.approx(np.mean(one) - np.mean(other))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_an_example_weighs_as_much_as_it_counts():
    # 2 nats over 1 token, and 6 over 3: 8 nats over 4 tokens, whatever the examples' own means are.
    found = paired_on_examples(np.array([3.0, 9.0]), np.array([1.0, 3.0]), np.array([1, 3]))
    assert (found.value, found.low, found.high, found.p_value) == (2.0, 2.0, 2.0, 0.0)
    # By hand: R = 4/4 = 1, residuals (-1, 1), se² = 2/1 · 2 / 16 = 1/4, t = 2 with 1 degree of freedom.
    found = paired_on_examples(np.array([0.0, 4.0]), np.zeros(2), np.array([1, 3]))
    assert found.value == 1.0
    assert found.p_value == pytest.approx(1 - 2 * math.atan(2) / math.pi)  # Student's t with 1 degree is Cauchy's
    half_width = math.tan(math.pi * 0.475) / 2
    assert (found.low, found.high) == pytest.approx((1 - half_width, 1 + half_width))


def test_the_error_is_that_of_the_jackknife_for_many_examples():
    generator = np.random.default_rng(1)
    counts = generator.integers(1, 50, 2000)
    one = generator.normal(0.1, 1, 2000) * counts
    found = paired_on_examples(one, np.zeros(2000), counts)
    left_out = (one.sum() - one) / (counts.sum() - counts)
    error = math.sqrt(1999 / 2000 * np.sum((left_out - left_out.mean()) ** 2))
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 1999) * error, rel=0.01)


def test_p_values_agree_with_flipping_signs():
    generator = np.random.default_rng(2)
    counts = generator.integers(5, 40, 80)
    differences = generator.normal(0.03, 0.2, 80) * counts
    found = paired_on_examples(differences, np.zeros(80), counts)
    flipped = stats.permutation_test(
        (differences, np.zeros(80)),
        lambda a, b, axis: (a - b).sum(axis),
        permutation_type="samples",
        n_resamples=5000,
        rng=3,
    )
    assert 0.001 < flipped.pvalue < 0.5
    assert found.p_value == pytest.approx(flipped.pvalue, abs=0.03)


def test_nineteen_of_twenty_intervals_contain_the_true_value():
    generator = np.random.default_rng(4)
    counts = generator.integers(5, 40, 60)
    held = 0
    for _ in range(1000):
        differences = counts * 0.5 + generator.standard_t(5, 60) * counts
        found = paired_on_examples(differences, np.zeros(60), counts)
        held += found.low <= 0.5 <= found.high
    assert 0.92 < held / 1000 < 0.97


def test_examples_without_a_count_change_nothing():
    generator = np.random.default_rng(5)
    one, counts = generator.normal(0, 1, 30), generator.integers(1, 5, 30)
    padded = paired_on_examples(np.append(one, [0, 0]), np.zeros(32), np.append(counts, [0, 0]))
    assert padded == paired_on_examples(one, np.zeros(30), counts)
    assert math.isnan(paired_on_examples(np.zeros(3), np.zeros(3), np.zeros(3)).p_value)


def test_equal_models_do_not_differ():
    same = np.arange(5.0)
    assert paired_on_examples(same, same, np.ones(5)).p_value == 1.0
    assert on_seeds({"0": [1.0], "1": [2.0]}, {"0": [1.0], "1": [2.0]}).p_value == 1.0


def test_the_same_seeds_are_paired_and_others_are_not():
    one, other = {"0": [1.0], "1": [2.5], "2": [3.0]}, {"2": [2.8], "0": [0.5], "1": [1.8]}
    paired, expected = on_seeds(one, other), stats.ttest_rel([1.0, 2.5, 3.0], [0.5, 1.8, 2.8])
    assert paired.p_value == pytest.approx(expected.pvalue)
    assert (paired.low, paired.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    welch = on_seeds(one, {"5": [0.5], "6": [1.8]})
    assert (paired.test, paired.count, welch.test, welch.count) == ("paired t", 3, "Welch's t", 5)
    assert welch.p_value == pytest.approx(stats.ttest_ind([1.0, 2.5, 3.0], [0.5, 1.8], equal_var=False).pvalue)
    assert on_seeds(one, {"0": [0.5]}) is None


def test_holm_by_hand():
    # In order .005·4, .01·3, .03·2, .04·1, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    corrected = holm([0.01, math.nan, 0.02])
    assert corrected[0] == pytest.approx(0.02)
    assert math.isnan(corrected[1])
