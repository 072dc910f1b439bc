"""Tables of what each example scored."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dskd.evaluation.held_out_text import MEASURES
from dskd.evaluation.scores_by_example import Examples, Measure, read_examples, save_examples

ACCURACY = Measure("accuracy", "score", "answered")


def test_a_task_with_one_score_an_example_is_such_a_table_too(tmp_path):
    columns = {"score": np.array([1, 0, 1]), "answered": np.ones(3, dtype=np.int64)}
    save_examples(tmp_path / "examples.parquet", Examples("f" * 64, ["cola/3", "cola/1", "ä"], columns, [ACCURACY]))
    table = pq.read_table(tmp_path / "examples.parquet")
    assert table.to_pydict() == {"example": ["cola/3", "cola/1", "ä"], "score": [1, 0, 1], "answered": [1, 1, 1]}
    assert json.loads(table.schema.metadata[b"dskd"])["data"] == "f" * 64
    found = read_examples((tmp_path / "examples.parquet").read_bytes())
    assert (found.data, list(found.ids), list(found.measures)) == ("f" * 64, ["cola/3", "cola/1", "ä"], [ACCURACY])
    assert found.values() == {"accuracy": pytest.approx(2 / 3)}


def test_a_measure_over_nothing_has_no_value_and_a_perplexity_no_overflow():
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
def test_other_tables_are_refused(tmp_path, table, about):
    if about is not None:
        table = table.replace_schema_metadata({b"dskd": json.dumps(about)})
    pq.write_table(table, tmp_path / "examples.parquet")
    with pytest.raises(ValueError, match="no table of examples"):
        read_examples((tmp_path / "examples.parquet").read_bytes())


def test_what_is_no_parquet_is_refused():
    with pytest.raises(ValueError, match="no table of examples"):
        read_examples(b"PAR1 or so")
