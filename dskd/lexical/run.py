"""Lexical measures on all ranks: `WORKDIR/lexical/NAME`, for teacher, cut student and exports."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dskd import evaluate
from dskd.config import Config
from dskd.console import say, stage
from dskd.distributed import World, main_first, on_main
from dskd.errors import UserError
from dskd.evaluate import CUT_STUDENT, TEACHER, Candidate, HeldOutText, candidates
from dskd.examples import Examples, Measure, read_examples, save_examples
from dskd.lexical import alignment, preference, retrieval, separation, wic
from dskd.lexical.held_out import Items, build_items, load_items
from dskd.lexical.reading import TARGET, WORD, Tokens, read_likelihoods, read_states
from dskd.lexical.scores import Item, area, clustered_error, columns_of, summarize
from dskd.manifest import Manifest, Recipe, build_artifact, is_current, write_json
from dskd.models import FrozenModel, load_frozen
from dskd.senses.dictionary import SenseDictionary, load_dictionary
from dskd.shards import load_manifest
from dskd.text_table import table
from dskd.tracking import log_results

FOLDER, FILE, EXAMPLES_FILE, ITEMS_FILE = "lexical", "measures.json", "examples.parquet", "items.parquet"
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


def run_lexical(config: Config, world: World, names: Sequence[str] | None = None, *, force: bool = False) -> None:
    """Measures every model whose lexical measures are not up to date, and says those of all.

    Perplexity on lexical targets is the evaluation's: that is brought up to date first.

    Args:
        config: the experiment.
        world: the ranks; all of them must call this.
        names: teacher, student and runs, or None for all there are.
        force: measure also what is up to date.

    Raises:
        UserError: when a model of `names` is not there, or there is no corpus.
    """
    models = main_first(lambda: _chosen(config, names))
    manifest = main_first(lambda: build_items(config, candidates(config)[0].folder))
    evaluate.evaluate(config, world)
    wanted = {model.name: recipe(config, model, manifest) for model in models}
    # Rank 0's word counts: all ranks must measure the same models.
    stale = on_main(lambda: [n for n, it in wanted.items() if force or not is_current(config.path(FOLDER, n), it)])
    items = load_items(config)
    dictionary, _ = load_dictionary(config)
    text = HeldOutText(config, load_manifest(config, "validation"), dictionary.path, world) if stale else None
    for model in models:
        if model.name not in stale:
            say(f"up to date: {config.path(FOLDER, model.name)}")
            continue
        assert text is not None
        target = config.path(FOLDER, model.name)
        with stage(f"lexical knowledge: {model.name}", reads=[model.folder.path, "lexical items"], writes=target):
            frozen = load_frozen(model.folder, config, world)
            found, summary = measure(frozen, items, text, dictionary, _texts_at_once(config, items), world)
            frozen.close()
            on_main(functools.partial(_publish, config, model, wanted[model.name], found, summary, manifest.digest))
    on_main(lambda: say(f"\n{comparison(config, [model.name for model in models])}"))


def recipe(config: Config, candidate: Candidate, items: Manifest) -> Recipe:
    """What decides a model's results. The batch size does not."""
    teacher = candidates(config)[0].folder
    evaluated = evaluate.recipe(config, candidate, teacher)
    inputs = {**evaluated.inputs, "items": items.digest}
    return Recipe("lexical", inputs, {"precision": config.precision}, teacher.digest, teacher.tokenizer_digest)


def measure(
    model: FrozenModel,
    items: Items,
    text: HeldOutText,
    dictionary: SenseDictionary,
    batch_size: int,
    world: World,
) -> tuple[list[Item], Summary]:
    """What a model scores on each item, and the areas that are no mean over items, on every rank."""
    found, areas = measure_items(model, items, batch_size, world)
    return found + alignment.senses_of_positions(model, text, dictionary, world), areas


def measure_items(model: FrozenModel, items: Items, batch_size: int, world: World) -> tuple[list[Item], Summary]:
    """The same of what needs no shards; `batch_size` texts are read at once."""
    found: list[Item] = []
    areas: Summary = {}
    states = read_states(model, items.context_tokens, batch_size, world, label="words in examples")
    for place, suffix in ((WORD, ""), (TARGET, "_target")):
        name = f"{separation.MEASURE}{suffix}"
        found += separation.separation(items.contexts, states[:, place], name)
        if items.contexts:
            areas[f"{name}_pooled"] = separation.pooled(items.contexts, states[:, place])
        found += retrieval.retrieval(items.contexts, states[:, place], suffix)
    if items.choices:
        areas[preference.SHARE] = preference.frequency_share(items.choices)
    pairs = [tokens for choice in items.choices for tokens in (choice.synonym, choice.antonym)]
    likelihoods = read_likelihoods(model, pairs, batch_size, world, label="synonyms or antonyms")
    found += preference.preference(items.choices, likelihoods.tolist())
    if items.wic:
        scores = _wic_similarities(model, items.wic_tokens, batch_size, world)
        labels = [pair.is_same for pair in items.wic]
        areas[wic.AUC] = area(scores, labels, [pair.word for pair in items.wic])
        if items.wic_threshold:
            tuning = _wic_similarities(model, items.wic_threshold_tokens, batch_size, world)
            threshold = wic.best_threshold(tuning, torch.tensor([p.is_same for p in items.wic_threshold]).numpy())
            found += wic.accuracy(items.wic, scores, threshold)
    return found, areas


def _wic_similarities(model: FrozenModel, pairs: list[tuple[Tokens, Tokens]], batch_size: int, world: World) -> Any:
    texts = [tokens for pair in pairs for tokens in pair]
    return wic.similarities(read_states(model, texts, batch_size, world, label="words in context")[:, WORD])


def _texts_at_once(config: Config, items: Items) -> int:
    """As many as have the tokens of the evaluation's batch."""
    rows = [*items.context_tokens, *(choice.synonym for choice in items.choices)]
    rows += [tokens for pair in (*items.wic_tokens, *items.wic_threshold_tokens) for tokens in pair]
    longest = max((len(tokens.input_ids) for tokens in rows), default=1)
    return max(1, config.evaluation.batch_size * config.corpus.sequence_length // longest)


def _chosen(config: Config, names: Sequence[str] | None) -> list[Candidate]:
    found = candidates(config)
    there = [candidate.name for candidate in found]
    missing = [name for name in names or () if name not in there]
    if missing:
        raise UserError(f"--models {missing[0]}: there is no such model here; there are {', '.join(there)}")
    return [candidate for candidate in found if names is None or candidate.name in names]


def _perplexity(config: Config, candidate: Candidate) -> Summary:
    """Perplexity on lexical targets, from the evaluation."""
    vocab_size = candidate.folder.load_config().vocab_size
    path = config.path(evaluate.FOLDER, candidate.name, evaluate.EXAMPLES_FILE)
    columns = read_examples(path.read_bytes()).columns
    by_name = {measure.name: measure for measure in evaluate.MEASURES}
    lexical = by_name["lexical_perplexity"]
    value = lexical.value(columns)
    counts = columns[lexical.count]
    if not counts.sum():
        return {}
    error = clustered_error(columns[lexical.total], counts)
    return {
        lexical.name: {
            "value": value,
            "standard_error": None if error is None else value * error,  # of exp, to the first order
            "chance": vocab_size,  # of a model that finds all tokens equally probable
            "items": int(counts.sum()),
            "clusters": int((counts > 0).sum()),
        }
    }


def _publish(
    config: Config, candidate: Candidate, wanted: Recipe, items: Sequence[Item], areas: Summary, data: str
) -> None:
    summary = summarize(items) | areas | _perplexity(config, candidate)
    clusters, columns = columns_of(items)
    names = list(dict.fromkeys(item.measure for item in items))
    target = config.path(FOLDER, candidate.name)
    with build_artifact(target, wanted) as building:
        write_json(building.folder / FILE, summary)
        measures = [Measure(name, name, f"{name}_items") for name in names]
        save_examples(building.folder / EXAMPLES_FILE, Examples(data, clusters, columns, measures))
        rows = [dict(zip(_ITEMS_SCHEMA.names, _row(item), strict=True)) for item in items]
        pq.write_table(pa.Table.from_pylist(rows, _ITEMS_SCHEMA), building.folder / ITEMS_FILE, compression="zstd")
    if candidate.mlflow_run_id and config.tracking.enabled:
        values = {name: one["value"] for name, one in summary.items()}
        examples = target / EXAMPLES_FILE
        log_results(
            config, candidate.name, candidate.mlflow_run_id, FOLDER, values, examples, data=data, step=candidate.step
        )


def _row(item: Item) -> tuple[Any, ...]:
    return item.measure, item.cluster, item.name, item.total, item.chance, item.num


def load_summary(config: Config, name: str) -> Summary:
    """{measure: value, standard_error, chance, items, clusters, …} of a model that was measured."""
    return json.loads(config.path(FOLDER, name, FILE).read_text(encoding="utf-8"))


def comparison(config: Config, names: Sequence[str]) -> str:
    """Measures × models: value ± standard error; chance before them, and the teacher, the ceiling, last."""
    order = [name for name in names if name not in (TEACHER, CUT_STUDENT)]
    order = [n for n in (CUT_STUDENT, *order, TEACHER) if n in names]
    summaries = {name: load_summary(config, name) for name in order}
    measures = list(dict.fromkeys(measure for summary in summaries.values() for measure in summary))
    rows = []
    for name in measures:
        one = next(summary[name] for summary in summaries.values() if name in summary)
        cells = [_cell(summaries[model].get(name)) for model in order]
        rows.append([name.replace("_", " "), f"{one['items']:,}", _number(one["chance"]), *cells])
    return table(["measure", "items", "chance", *order], rows)


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    error = one.get("standard_error")
    return _number(one["value"]) + (f" ± {_number(error)}" if error is not None else "")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
