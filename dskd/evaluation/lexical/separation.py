"""Sense separation: whether two examples of one sense are more similar than two examples of different senses.

A lemma (with its part of speech) takes part if it has examples of at least two synsets, and two examples of at least
one of them. Every pair of its examples has either the same synset or different ones. A pair's score is the cosine of
the model's states at the word. The lemma's score is the ROC AUC of same against different: the chance that a pair of
the same sense is the more similar one. The measure is the mean over lemmas, so a lemma's general level of similarity,
which differs between lemmas for reasons that have nothing to do with senses, does not influence it.

`pooled` is the plain ROC AUC over the pairs of all lemmas together, at most `MOST_PAIRS` of either kind from each
lemma. A lemma's level does influence it, but it has items even when few lemmas have pairs of both kinds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dskd.evaluation.lexical.contexts import Context
from dskd.evaluation.lexical.scores import Item, area, roc_auc
from dskd.random_numbers import derived_seed, random_bits

MEASURE = "sense_separation"
MOST_PAIRS = 20


def lemmas_with_pairs(contexts: Sequence[Context]) -> dict[str, list[int]]:
    """Returns {lemma and part of speech: indices of its contexts}, for those with at least two contexts."""
    by_lemma: dict[str, list[int]] = {}
    for number, context in enumerate(contexts):
        by_lemma.setdefault(context.cluster, []).append(number)
    return {lemma: numbers for lemma, numbers in sorted(by_lemma.items()) if len(numbers) > 1}


def lemmas_with_both(contexts: Sequence[Context]) -> dict[str, list[int]]:
    """Returns those of :func:`lemmas_with_pairs` that have pairs of the same sense and pairs of different senses."""
    return {
        lemma: numbers
        for lemma, numbers in lemmas_with_pairs(contexts).items()
        if 1 < len({contexts[number].synset for number in numbers}) < len(numbers)
    }


def separation(contexts: Sequence[Context], states: torch.Tensor, measure: str = MEASURE) -> list[Item]:
    """Returns one item per lemma, from the states [N, D] of the contexts."""
    return [
        Item(measure, lemma, lemma, roc_auc(similarities, same), 0.5)
        for lemma, (similarities, same) in _pairs(contexts, states).items()
        if 0 < same.sum() < len(same)
    ]


def pooled(contexts: Sequence[Context], states: torch.Tensor) -> dict[str, Any]:
    """Returns value, chance, items (pairs), clusters (lemmas), standard error and interval over all pairs together."""
    scores: list[float] = []
    labels: list[bool] = []
    clusters: list[str] = []
    for lemma, (similarities, same) in _pairs(contexts, states).items():
        order = random_bits(derived_seed(0, "pairs", lemma), torch.arange(len(same))).argsort().numpy()
        for kind in (True, False):
            drawn = [number for number in order if same[number] == kind][:MOST_PAIRS]
            scores += similarities[drawn].tolist()
            labels += [kind] * len(drawn)
            clusters += [lemma] * len(drawn)
    return area(scores, labels, clusters)


def _pairs(contexts: Sequence[Context], states: torch.Tensor) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {lemma: (cosines, booleans)}: for each pair of contexts, its cosine and whether its sense is the same."""
    pairs = {}
    for lemma, numbers in lemmas_with_pairs(contexts).items():
        directions = F.normalize(states[numbers].double(), dim=-1)
        one, other = np.triu_indices(len(numbers), k=1)
        synsets = np.array([contexts[number].synset for number in numbers])
        pairs[lemma] = (directions @ directions.T).numpy()[one, other], synsets[one] == synsets[other]
    return pairs
