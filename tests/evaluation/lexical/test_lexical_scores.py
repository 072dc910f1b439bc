"""Means, areas and errors of lexical measures, against sklearn and values by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dskd.evaluation.lexical.scores import Item, area, columns_of, roc_auc, summarize


def test_areas_are_sklearns_also_with_ties():
    random = np.random.default_rng(0)
    for _ in range(20):
        labels = random.random(50) < 0.4
        scores = random.normal(size=50).round(1) + 0.5 * labels
        assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert roc_auc(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert math.isnan(roc_auc(np.array([1.0, 2.0]), np.array([True, True])))


def test_items_of_one_lemma_are_one_observation():
    """Two lemmas with equal items each tell as much as two items, however many items they have."""
    items = [Item("m", "a", f"a{i}", 1.0, 0.25) for i in range(50)] + [
        Item("m", "b", f"b{i}", 0.0, 0.5) for i in range(50)
    ]
    summary = summarize([*items, Item("other", "a", "x", 6.0, 1.5, 3)])
    assert summary["m"] == {
        "value": 0.5,
        "standard_error": pytest.approx(0.5),  # of 0 and 1
        "chance": 0.375,
        "items": 100,
        "clusters": 2,
    }
    assert (summary["other"]["value"], summary["other"]["chance"], summary["other"]["items"]) == (2.0, 0.5, 3)
    clusters, columns = columns_of([*items, Item("other", "a", "x", 6.0, 1.5, 3)])
    assert clusters == ["a", "b"]
    assert columns["m"].tolist() == [50.0, 0.0]
    assert (columns["other"].tolist(), columns["other_items"].tolist()) == ([6.0, 0.0], [3, 0])


def test_the_bootstrap_has_the_spread_of_new_samples():
    """It draws clusters: items that are repeated five times tell no more than one of each."""
    random = np.random.default_rng(2)

    def draw(repeats: int) -> tuple[list[float], list[bool], list[str]]:
        labels = random.random(120) < 0.5
        scores = random.normal(size=120) + labels
        names = [str(number) for number in range(120)]
        return list(scores.repeat(repeats)), list(labels.repeat(repeats)), list(np.repeat(names, repeats))

    spread = np.std(
        [roc_auc(np.array(scores), np.array(labels)) for scores, labels, _ in (draw(1) for _ in range(300))]
    )
    for repeats in (1, 5):
        found = area(*draw(repeats))
        assert found["standard_error"] == pytest.approx(spread, rel=0.3)
        assert found["interval"][0] < found["value"] < found["interval"][1]
        assert (found["items"], found["clusters"], found["chance"]) == (120 * repeats, 120, 0.5)
    assert "standard_error" not in area([1.0, 2.0], [True, False], ["a", "a"])
