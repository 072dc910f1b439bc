"""Measures computed from items: means and areas, with errors that count the items of one lemma as one observation.

Items of one lemma resemble each other, so the lemma is the cluster. The standard error of a mean is that of a ratio of
sums over clusters (:func:`dskd.evaluation.scores_by_example.standard_error`); that of an area is from the bootstrap
over clusters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from dskd.evaluation.scores_by_example import standard_error

_REPLICATES = 500


class Item(NamedTuple):
    """A model's score on an item of a measure, or the sum of its scores on `num` items."""

    measure: str
    cluster: str
    name: str  # unique within its measure
    total: float
    chance: float  # the expected score of guessing
    num: int = 1


def summarize(items: Iterable[Item]) -> dict[str, dict[str, Any]]:
    """Returns {measure: {value, standard_error, chance, items, clusters}}; the error of a single cluster is None."""
    by_measure: dict[str, list[Item]] = {}
    for item in items:
        by_measure.setdefault(item.measure, []).append(item)
    summary = {}
    for measure, of_measure in by_measure.items():
        totals, counts, chances = _sums(of_measure)
        count = math.fsum(counts)
        if count:
            summary[measure] = {
                "value": math.fsum(totals) / count,
                "standard_error": standard_error(totals, counts),
                "chance": math.fsum(chances) / count,
                "items": int(count),
                "clusters": int(np.count_nonzero(counts)),
            }
    return summary


def _sums(items: Iterable[Item]) -> np.ndarray:
    """Returns the totals, counts and chances [3, clusters]."""
    sums: dict[str, np.ndarray] = {}
    for item in items:
        sums[item.cluster] = sums.get(item.cluster, 0.0) + np.array([item.total, item.num, item.chance])
    return np.array([sums[cluster] for cluster in sorted(sums)]).T


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the chance that an item with a true label scores higher than one with a false label; ties count half.

    It is the Mann-Whitney statistic divided by the number of pairs; NaN if either class is missing.
    """
    labels = labels.astype(bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return math.nan
    ranks = stats.rankdata(scores)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def area(scores: Sequence[float], labels: Sequence[bool], clusters: Sequence[str]) -> dict[str, Any]:
    """Returns the ROC AUC of all items together, with a standard error and a 95 % interval.

    The error and the interval are from the bootstrap over clusters, which draws the same clusters for every model. A
    draw that lacks one of the classes is left out.
    """
    values, truth = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    names, members = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    rows_of = [np.flatnonzero(members == number) for number in range(len(names))]
    # Each replicate draws as many clusters as there are, with replacement, and takes all items of each.
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(_REPLICATES if len(names) > 1 else 0):
        rows = np.concatenate([rows_of[number] for number in generator.integers(len(names), size=len(names))])
        drawn.append(roc_auc(values[rows], truth[rows]))
    areas = np.array(drawn)[~np.isnan(drawn)] if drawn else np.zeros(0)
    result: dict[str, Any] = {
        "value": roc_auc(values, truth),
        "chance": 0.5,
        "items": len(values),
        "clusters": len(names),
    }
    if len(areas) > 1:
        low, high = np.quantile(areas, [0.025, 0.975])
        result |= {"standard_error": float(areas.std(ddof=1)), "interval": [float(low), float(high)]}
    return result


def columns_of(items: Sequence[Item]) -> tuple[list[str], Mapping[str, np.ndarray]]:
    """Returns the sorted clusters, and columns of sums over each cluster.

    Each measure has two columns: `MEASURE`, its total, and `MEASURE_items`, its number of items.
    """
    clusters = sorted({item.cluster for item in items})
    index = {cluster: number for number, cluster in enumerate(clusters)}
    columns: dict[str, np.ndarray] = {}
    for item in items:
        if item.measure not in columns:
            columns[item.measure] = np.zeros(len(clusters))
            columns[f"{item.measure}_items"] = np.zeros(len(clusters), dtype=np.int64)
        columns[item.measure][index[item.cluster]] += item.total
        columns[f"{item.measure}_items"][index[item.cluster]] += item.num
    return clusters, columns
