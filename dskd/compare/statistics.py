"""Intervals over seeds, and paired tests of differences.

They answer two separate questions. Over *examples*: would these very models differ on other text of this kind? Over
*seeds*: would other trainings with the same settings differ? Tests over examples have many examples and small
intervals, but tell nothing about other trainings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dskd.evaluation.scores_by_example import standard_error

LEVEL = 0.05  # of significance
CONFIDENCE = 1 - LEVEL
INTERVAL = f"{100 * CONFIDENCE:.0f} % interval"  # in tables and notes
PAIRED, WELCH = "paired t", "Welch's t"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the 95 % interval of Student's t; a single seed has no interval."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Computes the estimate from one value per seed."""
        mean, count = float(np.mean(values)), len(values)
        if count < 2:
            return cls(mean, None)
        return cls(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values)))


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval and the two-sided p-value of the hypothesis that there is none."""

    value: float
    low: float
    high: float
    p_value: float
    count: int  # examples, pairs of runs, or runs of both together
    test: str


def paired_on_examples(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> Difference:
    """Computes a paired t test of two models, or of two groups' means over seeds, on the same examples.

    The difference is that of the measures themselves, R = sum(one - other) / sum(counts), from the sums [N] of both
    over each example and their common counts [N]. For perplexity it is the difference of mean negative log-likelihoods
    per token, so each example is weighted by its tokens. The standard error of R is that of a ratio
    (:func:`dskd.evaluation.scores_by_example.standard_error`). If every count is 1, this is the ordinary paired t test.
    Examples with count 0 carry no information and are not counted.
    """
    differences, number = (one - other).astype(float), int((counts > 0).sum())
    value = float(differences[counts > 0].sum() / counts.sum()) if number else math.nan
    error = standard_error(differences, counts)
    if error is None:
        return Difference(value, math.nan, math.nan, math.nan, number, PAIRED)
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1)) * error
    # An error of 0: the difference is 0 on every example, or the same amount per count on every example.
    p_value = float(2 * stats.t.sf(abs(value) / error, number - 1)) if error else float(value == 0)
    return Difference(value, value - half_width, value + half_width, p_value, number, PAIRED)


def on_seeds(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> Difference | None:
    """Computes the difference of two groups' means over trainings; returns None if either has fewer than two.

    Both groups are given as {seed: values of its runs}. If they have the same seeds, once each, the test is paired by
    seed, because trainings with the same seed have the same data order and random draws. Otherwise it is Welch's t
    test.
    """
    first, second = ([value for values in group.values() for value in values] for group in (one, other))
    if min(len(first), len(second)) < 2:
        return None
    if one.keys() == other.keys() and len(first) == len(second) == len(one):
        name = PAIRED
        first, second = ([group[seed][0] for seed in sorted(one)] for group in (one, other))
        count = len(first)
        is_constant = len({a - b for a, b in zip(first, second, strict=True)}) == 1
        result = None if is_constant else stats.ttest_rel(first, second)
    else:
        name, count = WELCH, len(first) + len(second)
        is_constant = len(set(first)) == len(set(second)) == 1
        result = None if is_constant else stats.ttest_ind(first, second, equal_var=False)
    value = float(np.mean(first) - np.mean(second))
    if result is None:  # no spread at all, for example if the seed changes nothing
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, count, name)
    low, high = result.confidence_interval(CONFIDENCE)
    return Difference(value, float(low), float(high), float(result.pvalue), count, name)


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's step-down correction, which keeps the chance of any false alarm among these tests below the level.

    A NaN means that there was no test: it stays NaN and is not counted.
    """
    corrected = [math.nan] * len(p_values)
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
