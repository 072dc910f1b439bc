"""Retrieval of the right sense: which sense of its lemma a word has, according to the model's state at the word.

A query is an example whose synset has another example with the same lemma. The C senses of its lemma and part of speech
that have other examples, at least two, are ranked: by the cosine between the query's state and the mean direction of
the states of each sense's other examples. `sense_retrieval` is the share of queries whose sense comes first, chance
1/C; `sense_retrieval_rank` is the mean reciprocal rank of their senses, chance (1/1 + 1/2 + … + 1/C) / C. Equal cosines
share their ranks. Chance is the mean over items, each with its own C.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from dskd.evaluation.lexical.contexts import Context
from dskd.evaluation.lexical.scores import Item
from dskd.evaluation.lexical.separation import lemmas_with_both

ACCURACY, RANK = "sense_retrieval", "sense_retrieval_rank"


def retrieval(contexts: Sequence[Context], states: torch.Tensor, suffix: str = "") -> list[Item]:
    """Returns two items per query, from the states [N, D] of the contexts.

    `suffix` is added to the measures' names.
    """
    items = []
    for lemma, numbers in lemmas_with_both(contexts).items():
        directions = F.normalize(states[numbers].double(), dim=-1)
        synsets = [contexts[number].synset for number in numbers]
        senses = sorted(set(synsets))
        for query, right in enumerate(synsets):
            others = {
                sense: [n for n, synset in enumerate(synsets) if synset == sense and n != query] for sense in senses
            }
            if not others[right]:
                continue
            centroids = torch.stack([directions[others[sense]].mean(dim=0) for sense in senses])
            cosines = (F.normalize(centroids, dim=-1) @ directions[query]).numpy()
            accuracy, rank = scores_of(cosines, senses.index(right))
            name = f"{right}/{lemma}/{query}"
            count = len(senses)
            items.append(Item(f"{ACCURACY}{suffix}", lemma, name, accuracy, 1 / count))
            items.append(Item(f"{RANK}{suffix}", lemma, name, rank, float(np.mean(1 / np.arange(1, count + 1)))))
    return items


def scores_of(similarities: np.ndarray, right: int) -> tuple[float, float]:
    """Returns 1 or 0, whether the candidate `right` comes first, and its reciprocal rank.

    Equal similarities are averaged over all their orders.
    """
    before = int((similarities > similarities[right]).sum())
    equal = int((similarities == similarities[right]).sum())
    return float(not before) / equal, float(np.mean(1 / (before + np.arange(1, equal + 1))))
