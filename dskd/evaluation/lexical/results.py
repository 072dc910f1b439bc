"""A model's lexical measures, saved in `WORKDIR/lexical/NAME` and MLflow, and the table of all models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts.hashing import digest_of_json
from dskd.artifacts.manifest import Manifest
from dskd.config import Config
from dskd.console import table
from dskd.evaluation import held_out_text
from dskd.evaluation.evaluations import HELD_OUT, LEXICAL
from dskd.evaluation.lexical.alignment import MEASURES as OF_POSITIONS
from dskd.evaluation.lexical.scores import Item, columns_of, summarize
from dskd.evaluation.models import TEACHER, UNTRAINED_STUDENT, EvaluatedModel
from dskd.evaluation.scores_by_example import Examples, Measure, read_examples, save_examples, standard_error
from dskd.evaluation.suite import EXAMPLES_FILE, FILE, Measurement, Outcome

ITEMS_FILE = "items.parquet"
_ITEMS_SCHEMA = pa.schema(  # the fields of an Item, in their order
    [
        ("measure", pa.string()),
        ("cluster", pa.string()),
        ("item", pa.string()),
        ("total", pa.float64()),
        ("chance", pa.float64()),
        ("num", pa.int64()),
    ]
)
Summary = dict[str, dict[str, Any]]


def _perplexity(config: Config, candidate: EvaluatedModel) -> Summary:
    """Returns the perplexity on lexical targets, from the scores of the evaluation on held-out text."""
    vocab_size = candidate.folder.load_config().vocab_size
    path = HELD_OUT.folder_of(config, candidate.name) / EXAMPLES_FILE
    columns = read_examples(path.read_bytes()).columns
    lexical = next(measure for measure in held_out_text.MEASURES if measure.name == "lexical_perplexity")
    value = lexical.value(columns)
    counts = columns[lexical.count]
    if not counts.sum():
        return {}
    error = standard_error(columns[lexical.total], counts)
    return {
        lexical.name: {
            "value": value,
            "standard_error": None if error is None else value * error,  # by the delta method: d exp(x) = exp(x) dx
            "chance": vocab_size,  # the perplexity of a model that finds all tokens equally probable
            "items": int(counts.sum()),
            "clusters": int((counts > 0).sum()),
        }
    }


def outcome(config: Config, measurement: Measurement, items: Sequence[Item], areas: Summary, *, text: str) -> Outcome:
    """Returns a model's measures, with a function that writes its score on each item; needs those on held-out text.

    `areas` are the summaries of measures that are not means over items. `text` is the digest of the held-out tokens.
    """
    summary = summarize(items) | areas | _perplexity(config, measurement.candidate)
    inputs = measurement.recipe.inputs
    data = digest_of_json({"items": inputs["items"], "text": text})

    def write_files(folder: Path) -> None:
        clusters, columns = columns_of(items)
        names = list(dict.fromkeys(item.measure for item in items))
        measures = [Measure(n, n, f"{n}_items", data=inputs["shards"] if n in OF_POSITIONS else None) for n in names]
        save_examples(folder / EXAMPLES_FILE, Examples(data, clusters, columns, measures))
        rows = [dict(zip(_ITEMS_SCHEMA.names, item, strict=True)) for item in items]
        pq.write_table(pa.Table.from_pylist(rows, _ITEMS_SCHEMA), folder / ITEMS_FILE, compression="zstd")

    return Outcome(summary, {name: measure["value"] for name, measure in summary.items()}, data, write_files)


def load_summary(config: Config, name: str) -> Summary:
    """Loads {measure: {value, standard_error, chance, items, clusters, …}} of a model that was measured."""
    return json.loads((LEXICAL.folder_of(config, name) / FILE).read_text(encoding="utf-8"))


def comparison(config: Config, names: Sequence[str], items: Manifest) -> str:
    """Returns a table of measures × models: value ± standard error.

    Chance and the score of the letters alone (:mod:`dskd.evaluation.lexical.surface`) come before the models; the
    teacher, usually the ceiling, comes last.
    """
    surface = items.facts["surface"]
    order = [name for name in names if name not in (TEACHER, UNTRAINED_STUDENT)]
    order = [n for n in (UNTRAINED_STUDENT, *order, TEACHER) if n in names]
    summaries = {name: load_summary(config, name) for name in order}
    measures = list(dict.fromkeys(measure for summary in summaries.values() for measure in summary))
    rows = []
    for name in measures:
        any_entry = next(summary[name] for summary in summaries.values() if name in summary)
        cells = [_cell(summaries[model].get(name)) for model in order]
        before = [f"{any_entry['items']:,}", _number(any_entry["chance"]), _number(surface.get(name))]
        rows.append([name.replace("_", " "), *before, *cells])
    return table(["measure", "items", "chance", "surface", *order], rows)


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    error = entry.get("standard_error")
    return _number(entry["value"]) + (f" ± {_number(error)}" if error is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
