"""A model's lexical measures, saved in `WORKDIR/lexical/NAME` and MLflow, and the table of all models."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact, was_made_meanwhile
from dskd.artifacts.hashing import digest_of_json
from dskd.artifacts.manifest import Manifest, Recipe, write_json
from dskd.config import Config
from dskd.console import table
from dskd.evaluation import held_out_text
from dskd.evaluation.lexical.alignment import MEASURES as OF_POSITIONS
from dskd.evaluation.lexical.scores import Item, clustered_error, columns_of, summarize
from dskd.evaluation.models import CUT_STUDENT, TEACHER, Candidate
from dskd.evaluation.scores_by_example import Examples, Measure, read_examples, save_examples
from dskd.tracking import log_results

FILE, EXAMPLES_FILE, ITEMS_FILE = "measures.json", "examples.parquet", "items.parquet"
_ITEMS_SCHEMA = pa.schema(
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


def _perplexity(config: Config, candidate: Candidate) -> Summary:
    """Returns the perplexity on lexical targets, from the scores of the evaluation on held-out text."""
    vocab_size = candidate.folder.load_config().vocab_size
    path = config.path(kinds.EVALUATION.folder, candidate.name, held_out_text.EXAMPLES_FILE)
    columns = read_examples(path.read_bytes()).columns
    by_name = {measure.name: measure for measure in held_out_text.MEASURES}
    lexical = by_name["lexical_perplexity"]
    value = lexical.value(columns)
    counts = columns[lexical.count]
    if not counts.sum():
        return {}
    error = clustered_error(columns[lexical.total], counts)
    return {
        lexical.name: {
            "value": value,
            "standard_error": None if error is None else value * error,  # by the delta method: d exp(x) = exp(x) dx
            "chance": vocab_size,  # the perplexity of a model that finds all tokens equally probable
            "items": int(counts.sum()),
            "clusters": int((counts > 0).sum()),
        }
    }


def publish(
    config: Config,
    candidate: Candidate,
    wanted: Recipe,
    items: Sequence[Item],
    areas: Summary,
    *,
    text: str,
    force: bool,
) -> None:
    """Writes a model's measures and its score on each item, and logs them to MLflow if it is from a tracked run.

    If another process has meanwhile written results of the same recipe, those are kept.

    Args:
        config: the experiment.
        candidate: the model.
        wanted: the recipe of the results.
        items: the model's score on each item.
        areas: summaries of measures that are not a mean over items.
        text: digest of the held-out tokens.
        force: replace results even if they are up to date.
    """
    summary = summarize(items) | areas | _perplexity(config, candidate)
    clusters, columns = columns_of(items)
    names = list(dict.fromkeys(item.measure for item in items))
    target = config.path(kinds.LEXICAL.folder, candidate.name)
    if not force and was_made_meanwhile(target, wanted):
        return
    data = digest_of_json({"items": wanted.inputs["items"], "text": text})
    with build_artifact(target, wanted) as building:
        write_json(building.folder / FILE, summary)
        shards = wanted.inputs["shards"]
        measures = [Measure(n, n, f"{n}_items", data=shards if n in OF_POSITIONS else None) for n in names]
        save_examples(building.folder / EXAMPLES_FILE, Examples(data, clusters, columns, measures))
        rows = [dict(zip(_ITEMS_SCHEMA.names, _row(item), strict=True)) for item in items]
        pq.write_table(pa.Table.from_pylist(rows, _ITEMS_SCHEMA), building.folder / ITEMS_FILE, compression="zstd")
    if candidate.mlflow_run_id and config.tracking.enabled:
        values = {name: one["value"] for name, one in summary.items()}
        examples = target / EXAMPLES_FILE
        log_results(
            config,
            candidate.name,
            candidate.mlflow_run_id,
            kinds.LEXICAL.folder,
            values,
            examples,
            data=data,
            step=candidate.step,
        )


def _row(item: Item) -> tuple[Any, ...]:
    return item.measure, item.cluster, item.name, item.total, item.chance, item.num


def load_summary(config: Config, name: str) -> Summary:
    """Loads {measure: {value, standard_error, chance, items, clusters, …}} of a model that was measured."""
    return json.loads(config.path(kinds.LEXICAL.folder, name, FILE).read_text(encoding="utf-8"))


def comparison(config: Config, names: Sequence[str], items: Manifest) -> str:
    """Returns a table of measures × models: value ± standard error.

    Chance and the score of the letters alone (:mod:`dskd.evaluation.lexical.surface`) come before the models; the
    teacher, usually the ceiling, comes last.
    """
    surface = items.facts["surface"]
    order = [name for name in names if name not in (TEACHER, CUT_STUDENT)]
    order = [n for n in (CUT_STUDENT, *order, TEACHER) if n in names]
    summaries = {name: load_summary(config, name) for name in order}
    measures = list(dict.fromkeys(measure for summary in summaries.values() for measure in summary))
    rows = []
    for name in measures:
        one = next(summary[name] for summary in summaries.values() if name in summary)
        cells = [_cell(summaries[model].get(name)) for model in order]
        before = [f"{one['items']:,}", _number(one["chance"]), _number(surface.get(name))]
        rows.append([name.replace("_", " "), *before, *cells])
    return table(["measure", "items", "chance", "surface", *order], rows)


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    error = one.get("standard_error")
    return _number(one["value"]) + (f" ± {_number(error)}" if error is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
