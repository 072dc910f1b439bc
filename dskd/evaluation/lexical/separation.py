"""Sense separation: whether two examples of one sense lie nearer to each other than two of different senses.

Of a lemma and part of speech with examples of at least two synsets, and two examples of at least one, every pair of
examples is one of the same synset or of different ones. The pair's score is the cosine of the model's states at the
word, and the lemma's the ROC AUC of same against different: the chance that a pair of the same sense is the more
similar. The measure is the mean over lemmas: in it a lemma's own level of similarity, which differs between lemmas for
reasons that have nothing to do with senses, plays no part. `pooled` is the plain ROC AUC over the pairs of all lemmas
together, at most `MOST_PAIRS` of either kind from each: the lemma's level does play a part in it, and it has items
where few lemmas have pairs of both kinds.
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
    """{lemma and part of speech: the numbers of its contexts}, of those that have at least two."""
    by_lemma: dict[str, list[int]] = {}
    for number, context in enumerate(contexts):
        by_lemma.setdefault(context.cluster, []).append(number)
    return {lemma: numbers for lemma, numbers in sorted(by_lemma.items()) if len(numbers) > 1}


def lemmas_with_both(contexts: Sequence[Context]) -> dict[str, list[int]]:
    """Those of :func:`lemmas_with_pairs` that have pairs of the same and of different senses."""
    return {
        lemma: numbers
        for lemma, numbers in lemmas_with_pairs(contexts).items()
        if 1 < len({contexts[number].synset for number in numbers}) < len(numbers)
    }


def separation(contexts: Sequence[Context], states: torch.Tensor, measure: str = MEASURE) -> list[Item]:
    """An item a lemma, from the states [N, D] of the contexts."""
    return [
        Item(measure, lemma, lemma, roc_auc(similarities, same), 0.5)
        for lemma, (similarities, same) in _pairs(contexts, states).items()
        if 0 < same.sum() < len(same)
    ]


def pooled(contexts: Sequence[Context], states: torch.Tensor) -> dict[str, Any]:
    """Value, chance, items (pairs), clusters (lemmas), standard error and interval over all pairs together."""
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
    """{lemma: (cosines, whether of the same sense)} over its pairs."""
    found = {}
    for lemma, numbers in lemmas_with_pairs(contexts).items():
        directions = F.normalize(states[numbers].double(), dim=-1)
        one, other = np.triu_indices(len(numbers), k=1)
        synsets = np.array([contexts[number].synset for number in numbers])
        found[lemma] = (directions @ directions.T).numpy()[one, other], synsets[one] == synsets[other]
    return found
