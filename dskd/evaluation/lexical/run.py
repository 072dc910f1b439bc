"""Lexical measures on all ranks: `WORKDIR/lexical/NAME`, for teacher, untrained student and exports."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, Recipe
from dskd.config import Config
from dskd.console import say
from dskd.distributed.collectives import main_first, on_main
from dskd.distributed.world import World
from dskd.evaluation import held_out_text, suite
from dskd.evaluation.evaluations import LEXICAL
from dskd.evaluation.held_out_text import HeldOutInputs, HeldOutText
from dskd.evaluation.lexical import alignment, preference, retrieval, separation, wic
from dskd.evaluation.lexical.items import Items, build_items, load_items
from dskd.evaluation.lexical.results import Summary, comparison, outcome
from dskd.evaluation.lexical.scores import Item, area
from dskd.evaluation.lexical.states import TARGET, WORD, Tokens, read_likelihoods, read_states
from dskd.evaluation.models import EvaluatedModel, candidates, choose, same_on_all_ranks
from dskd.evaluation.suite import Measurement, Outcome
from dskd.models.limits import check_text
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.precision import resolve_precision


def run_lexical(config: Config, world: World, names: Sequence[str] | None = None, *, force: bool = False) -> None:
    """Measures every model whose lexical measures are not up to date, or with `force` all, and prints those of all.

    All ranks must call it. `names` are those of models (teacher, student, runs); None means all that exist. Perplexity
    on lexical targets is taken from the evaluation on held-out text, which is brought up to date first.

    Raises:
        UserError: when a model of `names` does not exist, or there is no corpus.
    """
    all_models = same_on_all_ranks(lambda: candidates(config))
    models = main_first(lambda: choose(config, all_models, names))
    teacher = all_models[0].folder
    # All ranks use rank 0's manifest: another job may replace the items by those of its own config at any time.
    manifest = Manifest(**on_main(lambda: asdict(build_items(config, teacher))))
    items = main_first(lambda: load_items(config, manifest))
    inputs = held_out_text.evaluate(config, world, all_models)
    measurements = [
        Measurement(LEXICAL, model, recipe(config, model, inputs, manifest), ["lexical items"]) for model in models
    ]
    stale = suite.find_stale(config, measurements, force=force)
    if stale:
        on_main(lambda: check_items(items, [measurement.candidate for measurement in stale], teacher.tokenizer))
        text = HeldOutText(config, inputs, world)

    def measure(model: FrozenModel, measurement: Measurement) -> Callable[[], Outcome]:
        scores, areas = measure_items(model, items, _texts_at_once(config, items), world)
        if text.compares_senses(model):
            scores += alignment.senses_of_positions(model, text, inputs.dictionary, world)
        return functools.partial(outcome, config, measurement, scores, areas, text=text.digest)

    suite.run(config, world, stale, measure, force=force)
    on_main(lambda: say(f"\n{comparison(config, [model.name for model in models], manifest)}"))


def recipe(config: Config, candidate: EvaluatedModel, inputs: HeldOutInputs, items: Manifest) -> Recipe:
    """Returns everything that a model's results depend on; the batch size is not part of it."""
    evaluated = held_out_text.recipe(config, candidate, inputs)
    return Recipe(
        kinds.LEXICAL.name,
        {**evaluated.inputs, "items": items.digest},
        {"precision": resolve_precision(config.precision)},
        evaluated.teacher,
        evaluated.tokenizer,
    )


def check_items(items: Items, models: Sequence[EvaluatedModel], tokenizer: Any) -> None:
    """Raises a UserError if a text of the items has a token that a model lacks, or more tokens than it has positions.
    `tokenizer` is the teacher's, which made their tokens.
    """
    texts = [
        (f"WordNet's example {context.text!r}", tokens)
        for context, tokens in zip(items.contexts, items.context_tokens, strict=True)
    ]
    texts += [(choice.name, tokens) for choice in items.choices for tokens in (choice.synonym, choice.antonym)]
    for pairs, read in ((items.wic, items.wic_tokens), (items.wic_threshold, items.wic_threshold_tokens)):
        texts += [(pair.name, tokens) for pair, both in zip(pairs, read, strict=True) for tokens in both]
    for model in models:
        model_config = model.folder.load_config()
        for name, tokens in texts:
            check_text(tokens.input_ids, model_config, tokenizer, f"{name} cannot be read by {model.name}")


def measure_items(model: FrozenModel, items: Items, batch_size: int, world: World) -> tuple[list[Item], Summary]:
    """Returns a model's score on each item that needs no shards, and the areas, which are not means over items.

    All ranks must call it, and all get the result. `batch_size` is the number of texts that a rank reads at once.
    """
    scores: list[Item] = []
    areas: Summary = {}
    states = read_states(model, items.context_tokens, batch_size, world, label="words in examples")
    for column, suffix in ((WORD, ""), (TARGET, "_target")):
        name = f"{separation.MEASURE}{suffix}"
        scores += separation.separation(items.contexts, states[:, column], name)
        if items.contexts:
            areas[f"{name}_pooled"] = separation.pooled(items.contexts, states[:, column])
        scores += retrieval.retrieval(items.contexts, states[:, column], suffix)
    pairs = [tokens for choice in items.choices for tokens in (choice.synonym, choice.antonym)]
    likelihoods = read_likelihoods(model, pairs, batch_size, world)
    scores += preference.preference(items.choices, likelihoods.tolist())
    if items.wic:
        similarities = _wic_similarities(model, items.wic_tokens, batch_size, world)
        labels = [pair.is_same for pair in items.wic]
        areas[wic.AUC] = area(similarities, labels, [pair.word for pair in items.wic])
        if items.wic_threshold:
            tuning = _wic_similarities(model, items.wic_threshold_tokens, batch_size, world)
            threshold = wic.best_threshold(tuning, torch.tensor([p.is_same for p in items.wic_threshold]).numpy())
            scores += wic.accuracy(items.wic, similarities, threshold)
    return scores, areas


def _wic_similarities(model: FrozenModel, pairs: list[tuple[Tokens, Tokens]], batch_size: int, world: World) -> Any:
    texts = [tokens for pair in pairs for tokens in pair]
    return wic.similarities(read_states(model, texts, batch_size, world, label="words in context")[:, WORD])


def _texts_at_once(config: Config, items: Items) -> int:
    """Returns the number of texts that have, at most, the tokens of one batch of the evaluation on held-out text."""
    rows = [*items.context_tokens, *(choice.synonym for choice in items.choices)]
    rows += [tokens for pair in (*items.wic_tokens, *items.wic_threshold_tokens) for tokens in pair]
    longest = max((len(tokens.input_ids) for tokens in rows), default=1)
    return max(1, config.evaluation.batch_size * config.corpus.sequence_length // longest)
