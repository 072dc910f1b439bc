"""Tables of the scores of each example, and the standard errors of ratios of their sums."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from dskd.evaluation.held_out_text import MEASURES
from dskd.evaluation.scores_by_example import Examples, Measure, read_examples, save_examples, standard_error

ACCURACY = Measure("accuracy", "score", "answered")


def test_saved_examples_are_read_again_and_are_an_ordinary_parquet_file(tmp_path):
    columns = {"score": np.array([1, 0, 1]), "answered": np.ones(3, dtype=np.int64)}
    save_examples(tmp_path / "examples.parquet", Examples("f" * 64, ["cola/3", "cola/1", "ä"], columns, [ACCURACY]))
    table = pq.read_table(tmp_path / "examples.parquet")
    assert table.to_pydict() == {"example": ["cola/3", "cola/1", "ä"], "score": [1, 0, 1], "answered": [1, 1, 1]}
    assert json.loads(table.schema.metadata[b"dskd"])["data"] == "f" * 64
    found = read_examples((tmp_path / "examples.parquet").read_bytes())
    assert (found.data, list(found.ids), list(found.measures)) == ("f" * 64, ["cola/3", "cola/1", "ä"], [ACCURACY])
    assert found.values() == {"accuracy": pytest.approx(2 / 3)}


def test_a_measure_without_counts_is_nan_and_a_perplexity_does_not_overflow():
    perplexity = MEASURES[0]
    assert math.isnan(perplexity.value({"nll": np.zeros(2), "tokens": np.zeros(2)}))
    assert perplexity.value({"nll": np.array([2.0, 4.0]), "tokens": np.array([1, 2])}) == pytest.approx(math.exp(2))
    assert math.isfinite(perplexity.value({"nll": np.array([1e9]), "tokens": np.array([1])}))


@pytest.mark.parametrize(
    ("table", "about"),
    [
        (pa.table({"example": ["1"]}), None),
        (pa.table({"example": ["1"]}), {"data": "f", "measures": [vars(ACCURACY)]}),
        (
            pa.table({"example": ["1", "1"], "score": [1, 1], "answered": [1, 1]}),
            {"data": "f", "measures": [vars(ACCURACY)]},
        ),
        (pa.table({"score": [1, 1], "answered": [1, 1]}), {"data": "f", "measures": [vars(ACCURACY)]}),
    ],
)
def test_tables_without_ids_columns_or_measures_are_refused(tmp_path, table, about):
    if about is not None:
        table = table.replace_schema_metadata({b"dskd": json.dumps(about)})
    pq.write_table(table, tmp_path / "examples.parquet")
    with pytest.raises(ValueError, match="this is not a table of examples"):
        read_examples((tmp_path / "examples.parquet").read_bytes())


def test_a_file_that_is_not_parquet_is_refused():
    with pytest.raises(ValueError, match="this is not a table of examples"):
        read_examples(b"PAR1 or so")


def test_with_counts_of_one_the_standard_error_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(size=30)
    assert standard_error(values, np.ones(30)) == pytest.approx(stats.sem(values))
    assert standard_error(np.array([3.0]), np.array([5.0])) is None


def test_the_standard_error_of_a_ratio_is_that_computed_by_hand():
    # R = 4/4 = 1, residuals (-1, 1), se² = 2/1 · 2 / 16 = 1/4; the example without a count does not matter.
    assert standard_error(np.array([0.0, 4.0, 0.0]), np.array([1, 3, 0])) == pytest.approx(0.5)
