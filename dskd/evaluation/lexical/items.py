"""The items that all models are measured on: `WORKDIR/lexical_items`, made from WordNet when they are first needed.

An example of WordNet is used if it is not training text of this config: no run of `RUN_WORDS` of its words (all of its
words, if it has fewer) occurs in `WORKDIR/corpus/train.parquet` (:mod:`dskd.evaluation.lexical.training_text`). If the
corpus is WordNet's own text, these are the examples of held-out synsets; with other corpora most examples are used.
The same rule applies to sentences of Words in Context, many of which are WordNet's.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.files import write_text
from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.manifest import Manifest, Recipe, is_current, read_file, read_manifest
from dskd.config import Config
from dskd.console import progress, say, stage
from dskd.corpus.build import read_texts
from dskd.errors import OutageError, UserError
from dskd.evaluation.lexical.contexts import Context, read_contexts
from dskd.evaluation.lexical.preference import Choice, choices, phrases_of
from dskd.evaluation.lexical.separation import lemmas_with_both, lemmas_with_pairs
from dskd.evaluation.lexical.states import Tokens, tokenize
from dskd.evaluation.lexical.surface import surface_scores
from dskd.evaluation.lexical.training_text import RUN_WORDS, Phrase, count_phrases, is_new, runs_of
from dskd.evaluation.lexical.wic import Pair, gold_of, read_wic
from dskd.lexicon.wordnet import WordNet, open_wordnet
from dskd.models.files.folder import ModelFolder

FILE = "items.json"


@dataclass(frozen=True)
class Items:
    """The held-out items, in words and in tokens."""

    contexts: list[Context]  # of the lemmas that have several
    context_tokens: list[Tokens]
    choices: list[Choice]
    wic: list[Pair]
    wic_tokens: list[tuple[Tokens, Tokens]]
    wic_threshold: list[Pair]
    wic_threshold_tokens: list[tuple[Tokens, Tokens]]


_ITEMS = TypeAdapter(Items)
_FEW = 100


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns everything that the items depend on. Raises a UserError when there is no corpus or no WordNet, a file of
    Words in Context is not in its format, or the threshold's file has the same pairs as the other.
    """
    inputs = {
        "corpus": read_manifest(config.path(kinds.CORPUS.folder), kinds.CORPUS.name).digest,
        "wordnet": open_wordnet(config.wordnet.path).digest,
    }
    _read_pairs(config)  # so that a file in another format is refused before anything is made
    for key in ("wic", "wic_threshold"):
        file = getattr(config.evaluation, key)
        if file is not None:
            data = Path(file).expanduser()
            inputs |= {key: sha256_of_file(data), f"{key}_gold": sha256_of_file(gold_of(data))}
    return Recipe(kinds.LEXICAL_ITEMS.name, inputs, {"run_words": RUN_WORDS}, tokenizer=teacher.tokenizer_digest)


def _read_pairs(config: Config) -> tuple[list[Pair], list[Pair]]:
    """Returns the pairs to measure on, and those to choose the threshold on; [] if the config names no file."""
    files = {f"evaluation.{key}": getattr(config.evaluation, key) for key in ("wic", "wic_threshold")}
    measured, threshold = ([] if file is None else read_wic(file, key) for key, file in files.items())
    if measured and [pair[1:] for pair in measured] == [pair[1:] for pair in threshold]:  # without FILE:LINE
        raise UserError(
            f"evaluation.wic_threshold: {config.evaluation.wic_threshold} has the pairs of evaluation.wic, so the "
            "threshold would be chosen on the pairs that are measured; name another file, such as that of the training "
            "split, or leave the key out"
        )
    return measured, threshold


def build_items(config: Config, teacher: ModelFolder) -> Manifest:
    """Makes the items when they are not up to date, and returns their manifest. Raises the errors of :func:`recipe`,
    and a UserError when the tokenizer does not report the letters of each token.
    """
    target = config.path(kinds.LEXICAL_ITEMS.folder)
    current_recipe = recipe(config, teacher)
    if not is_current(target, current_recipe):
        tokenizer = teacher.tokenizer
        if not tokenizer.is_fast:
            raise UserError(
                f"{teacher.path}: {type(tokenizer).__name__} does not report the letters of each token, so no word can "
                "be found in a sentence; put the tokenizer's tokenizer.json into the folder"
            )
        sources: list[str | Path] = ["WordNet's examples", config.path(kinds.CORPUS.folder, "train.parquet")]
        with stage("lexical items: WordNet's examples that no training text has", reads=sources, writes=target):
            wordnet = open_wordnet(config.wordnet.path)
            with build_artifact(target, current_recipe) as building:
                texts = progress(
                    read_texts(config, "train"), total=None, label="searching the training text", unit="documents"
                )
                items, facts = make_items(wordnet, texts, tokenizer, *_read_pairs(config))
                write_text(building.folder / FILE, _ITEMS.dump_json(items).decode())
                surface = surface_scores(items.contexts, items.choices, items.wic, items.wic_threshold)
                building.facts.update(facts, surface=surface)
            say("  " + ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in facts.items()))
            if min(facts["of_both_kinds"], facts["synonyms_against_antonyms"]) < _FEW:
                say("  these are few; if the corpus is WordNet, a larger corpus.validation_share gives more of them")
    return read_manifest(target, kinds.LEXICAL_ITEMS.name)


def load_items(config: Config, manifest: Manifest) -> Items:
    """Loads the items of `WORKDIR/lexical_items` that the manifest describes. Raises an OutageError when another
    config's job has replaced them.
    """
    content = read_file(config.path(kinds.LEXICAL_ITEMS.folder), FILE) or b""
    if hashlib.sha256(content).hexdigest() != manifest.files[FILE]["sha256"]:
        raise OutageError(
            f"{config.path(kinds.LEXICAL_ITEMS.folder, FILE)}: these are not the items that were made for this config; "
            "another job may have replaced them by its own. Start again when that job has ended"
        )
    return _ITEMS.validate_json(content)


def make_items(
    wordnet: WordNet, training_texts: Iterable[str], tokenizer: Any, wic: list[Pair], wic_threshold: list[Pair]
) -> tuple[Items, dict[str, int]]:
    """Returns the items that no training text contains, and counts of all candidates and of those that were kept."""
    contexts = read_contexts(wordnet)
    pairs = [*wic, *wic_threshold]
    sentences = {
        *(context.text for context in contexts),
        *(marked.text for p in pairs for marked in (p.one, p.other)),
    }
    # One pass over the training text counts both the words to choose among and the runs that make a sentence known.
    phrases: set[Phrase] = phrases_of(contexts)
    phrases.update(run for text in sentences for run in runs_of(text))
    counts = count_phrases(training_texts, phrases)
    new = {text for text in sentences if is_new(text, counts)}
    held_out = [context for context in contexts if context.text in new]
    # Of the held-out contexts, keep those whose word is whole tokens, after the first, and of a lemma with several.
    tokenized = [(context, tokenize(tokenizer, context.text, context.start, context.stop)) for context in held_out]
    whole = [(context, tokens) for context, tokens in tokenized if tokens is not None and tokens.first > 0]
    of_lemmas = lemmas_with_pairs([context for context, _ in whole])
    kept = [whole[number] for numbers in of_lemmas.values() for number in numbers]
    measured, threshold = (_held_out_pairs(pairs, new, tokenizer) for pairs in (wic, wic_threshold))
    items = Items(
        [context for context, _ in kept],
        [tokens for _, tokens in kept],
        choices(held_out, counts, tokenizer),
        *map(list, zip(*measured, strict=True)) if measured else ([], []),
        *map(list, zip(*threshold, strict=True)) if threshold else ([], []),
    )
    facts = {
        "examples": len({context.text for context in contexts}),
        "held_out_examples": len({context.text for context in held_out}),
        "words_in_them": len(items.contexts),
        "lemmas_with_pairs": len(of_lemmas),
        "of_both_kinds": len(lemmas_with_both(items.contexts)),
        "synonyms_against_antonyms": len(items.choices),
    }
    for name, pairs, kept_pairs in (("wic", wic, items.wic), ("wic_threshold", wic_threshold, items.wic_threshold)):
        facts |= {f"{name}_pairs": len(pairs), f"held_out_{name}_pairs": len(kept_pairs)} if pairs else {}
    return items, facts


def _held_out_pairs(pairs: list[Pair], new: set[str], tokenizer: Any) -> list[tuple[Pair, tuple[Tokens, Tokens]]]:
    unseen = [pair for pair in pairs if pair.one.text in new and pair.other.text in new]
    return [(pair, tokens) for pair in unseen if (tokens := pair.tokenize(tokenizer)) is not None]
