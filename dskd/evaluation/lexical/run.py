"""Lexical measures on all ranks: `WORKDIR/lexical/NAME`, for teacher, cut student and exports."""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, Recipe, is_current
from dskd.config import Config
from dskd.console import say, stage
from dskd.distributed.collectives import main_first, on_main
from dskd.distributed.world import World
from dskd.evaluation import held_out_text
from dskd.evaluation.held_out_text import HeldOutText
from dskd.evaluation.lexical import alignment, preference, retrieval, separation, wic
from dskd.evaluation.lexical.items import Items, build_items, load_items
from dskd.evaluation.lexical.results import Summary, comparison, publish
from dskd.evaluation.lexical.scores import Item, area
from dskd.evaluation.lexical.states import TARGET, WORD, Tokens, read_likelihoods, read_states
from dskd.evaluation.models import Candidate, chosen, load_candidate, same_on_all_ranks
from dskd.models.folder import ModelFolder, find_teacher
from dskd.models.frozen import FrozenModel
from dskd.models.limits import check_text
from dskd.models.precision import resolve_precision
from dskd.senses.dictionary import SenseDictionary, load_dictionary
from dskd.shards import load_manifest


def run_lexical(config: Config, world: World, names: Sequence[str] | None = None, *, force: bool = False) -> None:
    """Measures every model whose lexical measures are not up to date, and prints those of all models.

    Perplexity on lexical targets is taken from the evaluation on held-out text, which is brought up to date first.

    Args:
        config: the experiment.
        world: the ranks; all of them must call this.
        names: names of models (teacher, student, runs); None: all models that exist.
        force: measure also models that are up to date.

    Raises:
        UserError: when a model of `names` does not exist, or there is no corpus.
    """
    models = same_on_all_ranks(lambda: chosen(config, names))
    # All ranks use rank 0's manifest: another job may replace the items by those of its own config at any time.
    manifest = Manifest(**on_main(lambda: asdict(build_items(config, find_teacher(config)))))
    items = main_first(lambda: load_items(config, manifest))
    held_out_text.evaluate(config, world)
    teacher = main_first(lambda: find_teacher(config))
    wanted = main_first(lambda: {model.name: recipe(config, model, teacher, manifest) for model in models})
    # Rank 0 decides, because all ranks must measure the same models.
    stale = on_main(
        lambda: [n for n, it in wanted.items() if force or not is_current(config.path(kinds.LEXICAL.folder, n), it)]
    )
    on_main(lambda: check_items(items, [model for model in models if model.name in stale], teacher.load_tokenizer()))
    dictionary, _ = main_first(lambda: load_dictionary(config))
    validation = main_first(lambda: load_manifest(config, "validation"))
    text = HeldOutText(config, validation, dictionary.path, world) if stale else None
    for model in models:
        if model.name not in stale:
            say(f"up to date: {config.path(kinds.LEXICAL.folder, model.name)}")
            continue
        assert text is not None
        target = config.path(kinds.LEXICAL.folder, model.name)
        with stage(f"lexical knowledge: {model.name}", reads=[model.folder.path, "lexical items"], writes=target):
            frozen = load_candidate(model, config, world)
            found, summary = measure(frozen, items, text, dictionary, _texts_at_once(config, items), world)
            frozen.close()
            publish_it = functools.partial(publish, config, model, wanted[model.name], found, summary)
            on_main(functools.partial(publish_it, text=text.digest, force=force))
    on_main(lambda: say(f"\n{comparison(config, [model.name for model in models], manifest)}"))


def recipe(config: Config, candidate: Candidate, teacher: ModelFolder, items: Manifest) -> Recipe:
    """Returns everything that a model's results depend on; the batch size is not part of it."""
    evaluated = held_out_text.recipe(config, candidate, teacher)
    inputs = {**evaluated.inputs, "items": items.digest}
    return Recipe(
        "lexical", inputs, {"precision": resolve_precision(config.precision)}, teacher.digest, teacher.tokenizer_digest
    )


def check_items(items: Items, models: Sequence[Candidate], tokenizer: Any) -> None:
    """Checks that models can read all texts of the items.

    Args:
        items: the items.
        models: the models that will read them.
        tokenizer: the teacher's tokenizer, which made their tokens.

    Raises:
        UserError: for a text with a token that a model lacks, or with more tokens than a model has positions.
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
        for place, tokens in texts:
            check_text(tokens.input_ids, model_config, tokenizer, f"{place} cannot be read by {model.name}")


def measure(
    model: FrozenModel,
    items: Items,
    text: HeldOutText,
    dictionary: SenseDictionary,
    batch_size: int,
    world: World,
) -> tuple[list[Item], Summary]:
    """Returns a model's score on each item, and the areas, which are not a mean over items, on every rank."""
    found, areas = measure_items(model, items, batch_size, world)
    return found + alignment.senses_of_positions(model, text, dictionary, world), areas


def measure_items(model: FrozenModel, items: Items, batch_size: int, world: World) -> tuple[list[Item], Summary]:
    """Returns what :func:`measure` does, for the items that need no shards; reads `batch_size` texts at once."""
    found: list[Item] = []
    areas: Summary = {}
    states = read_states(model, items.context_tokens, batch_size, world, label="words in examples")
    for place, suffix in ((WORD, ""), (TARGET, "_target")):
        name = f"{separation.MEASURE}{suffix}"
        found += separation.separation(items.contexts, states[:, place], name)
        if items.contexts:
            areas[f"{name}_pooled"] = separation.pooled(items.contexts, states[:, place])
        found += retrieval.retrieval(items.contexts, states[:, place], suffix)
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
    """Returns the number of texts that have, at most, the tokens of one batch of the evaluation on held-out text."""
    rows = [*items.context_tokens, *(choice.synonym for choice in items.choices)]
    rows += [tokens for pair in (*items.wic_tokens, *items.wic_threshold_tokens) for tokens in pair]
    longest = max((len(tokens.input_ids) for tokens in rows), default=1)
    return max(1, config.evaluation.batch_size * config.corpus.sequence_length // longest)
