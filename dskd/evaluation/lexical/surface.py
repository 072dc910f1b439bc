"""Scores of the letters alone: of a "model" that knows no meaning, as a second baseline in addition to chance.

Examples of one sense are also more alike as strings: WordNet's editors varied a sentence, and a sense has its typical
inflections. Therefore the measures are also computed with states that count the runs of three to five letters in the
text up to the word's end (`…_target`: up to its beginning), which is all that a decoder has read at that point. A
model's knowledge of senses is its score above this one. For synonym_preference, it is the score of always choosing the
word that is more frequent in the training text.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer

from dskd.evaluation.lexical import preference, retrieval, separation, wic
from dskd.evaluation.lexical.contexts import Context
from dskd.evaluation.lexical.preference import Choice
from dskd.evaluation.lexical.scores import roc_auc, summarize
from dskd.evaluation.lexical.wic import Pair

_DIMENSIONS = 2048


def surface_states(texts: Sequence[str]) -> torch.Tensor:
    """Returns the hashed counts [N, D] of each text's runs of letters; nothing is fitted."""
    if not texts:
        return torch.zeros(0, _DIMENSIONS)
    counts = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=_DIMENSIONS, dtype="float32")
    return torch.from_numpy(counts.transform(texts).toarray())


def surface_scores(
    contexts: Sequence[Context], choices: Sequence[Choice], pairs: Sequence[Pair], threshold_pairs: Sequence[Pair] = ()
) -> dict[str, float]:
    """Returns {measure: score} of the measures on sentences; the threshold is chosen as for a model."""
    scores = {}
    items = preference.preference(choices, [float(count) for choice in choices for count in choice.frequencies])
    for suffix, ends in (("", [c.stop for c in contexts]), ("_target", [c.start for c in contexts])):
        states = surface_states([context.text[:end] for context, end in zip(contexts, ends, strict=True)])
        name = f"{separation.MEASURE}{suffix}"
        items += separation.separation(contexts, states, name) + retrieval.retrieval(contexts, states, suffix)
        if contexts:
            scores[f"{name}_pooled"] = separation.pooled(contexts, states)["value"]
    if pairs:
        similarities, labels = _surface_of_pairs(pairs)
        scores[wic.AUC] = roc_auc(similarities, labels)
        if threshold_pairs:
            items += wic.accuracy(pairs, similarities, wic.best_threshold(*_surface_of_pairs(threshold_pairs)))
    return {name: entry["value"] for name, entry in summarize(items).items()} | scores


def _surface_of_pairs(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the similarity [n] of each pair's sentences up to the word's end, and whether its sense is the same."""
    states = surface_states([marked.text[: marked.stop] for pair in pairs for marked in (pair.one, pair.other)])
    return wic.similarities(states), np.array([pair.is_same for pair in pairs])
