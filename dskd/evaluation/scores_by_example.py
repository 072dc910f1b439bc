"""A model's scores on each example of an evaluation: the table that measures and comparisons are computed from.

A row is an example, with an id that is the same for every model evaluated on it. A column is a sum over the example,
such as its negative log-likelihood or its number of targets. A measure is the ratio of two columns' sums over all
examples, so it weighs an example by its count; in a task with one score per example every count is 1. The file lists
the measures that its columns make, so any evaluation written in this form can be compared.
"""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ID_COLUMN = "example"
_METADATA = b"dskd"


@dataclass(frozen=True)
class Measure:
    """A ratio of two columns, or its exponential, and whether lower values are better."""

    name: str
    total: str  # column in the numerator
    count: str  # column in the denominator; the same for every model on the same data
    lower_is_better: bool = False
    is_exponential: bool = False  # perplexity: exp of the ratio
    data: str | None = None  # digest of what it depends on in addition to the examples, such as the sense embeddings

    def value(self, columns: Mapping[str, Any]) -> float:
        """Returns the measure over all examples; NaN if the counts add up to 0."""
        total, count = float(np.sum(columns[self.total])), float(np.sum(columns[self.count]))
        if not count:
            return math.nan
        return math.exp(min(total / count, 700.0)) if self.is_exponential else total / count


@dataclass(frozen=True)
class Examples:
    """One model's table of N examples."""

    data: str  # digest of the evaluation's data
    ids: Sequence[str]  # [N], all different
    columns: Mapping[str, np.ndarray]  # each [N]
    measures: Sequence[Measure]

    def values(self) -> dict[str, float]:
        """Returns {measure: its value} of the measures that have one."""
        values = {measure.name: measure.value(self.columns) for measure in self.measures}
        return {name: value for name, value in values.items() if not math.isnan(value)}


def standard_error(totals: np.ndarray, counts: np.ndarray) -> float | None:
    """Returns the standard error of the ratio sum(totals) / sum(counts) over a sample of examples, both [N].

    It is linearised (Cochran, Sampling Techniques, 6.4): with the ratio R and the residuals e = total - R · count,
    se² = N/(N - 1) · sum(e²) / sum(counts)². If every count is 1, this is s / sqrt(N), the error of a mean. Examples
    with count 0 carry no information and are not part of N; with fewer than two others the error is None. If each
    example is a cluster, given as the sums over its members, the members may resemble each other.
    """
    totals, counts = totals[counts > 0], counts[counts > 0]
    number = len(counts)
    if number < 2:
        return None
    residuals = totals - totals.sum() / counts.sum() * counts
    return math.sqrt(number / (number - 1) * float(residuals @ residuals)) / float(counts.sum())


def save_examples(path: Path, examples: Examples) -> None:
    """Writes a Parquet file with the ids and the columns; the schema's metadata holds the digest and the measures."""
    table = pa.table({ID_COLUMN: pa.array(examples.ids, pa.string()), **examples.columns})
    pq.write_table(table.replace_schema_metadata(metadata_of(examples.data, examples.measures)), path)


def metadata_of(data: str, measures: Sequence[Measure]) -> dict[bytes, bytes]:
    """Returns the metadata of a table's schema: the digest of the data, and how its columns make the measures."""
    about = {"data": data, "measures": [dataclasses.asdict(measure) for measure in measures]}
    return {_METADATA: json.dumps(about).encode()}


def read_examples(content: bytes) -> Examples:
    """Reads the content of a file that :func:`save_examples` wrote; raises a ValueError for anything else."""
    try:
        table = pq.read_table(io.BytesIO(content))
        about = json.loads(table.schema.metadata[_METADATA])
        columns = {name: table.column(name).to_numpy() for name in table.column_names if name != ID_COLUMN}
        measures = [Measure(**measure) for measure in about["measures"]]
        ids = table.column(ID_COLUMN).to_pylist()
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is not a table of examples ({type(error).__name__}: {error})") from None
    missing = {column for measure in measures for column in (measure.total, measure.count)} - set(columns)
    if missing or len(set(ids)) != len(ids):
        raise ValueError(
            f"this is not a table of examples (missing columns: {sorted(missing)}; repeated ids: "
            f"{len(ids) - len(set(ids))})"
        )
    return Examples(about["data"], ids, columns, measures)
