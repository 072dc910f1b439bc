"""Retrieval of the right sense: which sense of the lemma it is, as the model's state at the word has it.

Of each example whose synset has another example with the same lemma, the senses are ranked by the cosine of its state
with the mean direction of each sense's other examples: C senses, those of the lemma and part of speech that have any,
at least two. `accuracy` is the share in which the right one comes first, chance 1/C; `rank` the mean of one by its
rank (mean reciprocal rank), chance (1/1 + 1/2 + … + 1/C) / C. Equal cosines share their places. Chance is the mean over
items, each with its own C.
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
    """Two items a query, from the states [N, D] of the contexts; `suffix` is added to the measures' names."""
    items = []
    for lemma, numbers in lemmas_with_both(contexts).items():
        directions = F.normalize(states[numbers].double(), dim=-1)
        synsets = [contexts[number].synset for number in numbers]
        senses = sorted(set(synsets))
        for query, own in enumerate(synsets):
            others = {
                sense: [n for n, synset in enumerate(synsets) if synset == sense and n != query] for sense in senses
            }
            if not others[own]:
                continue
            centroids = torch.stack([directions[others[sense]].mean(dim=0) for sense in senses])
            cosines = (F.normalize(centroids, dim=-1) @ directions[query]).numpy()
            accuracy, rank = scores_of(cosines, senses.index(own))
            name = f"{own}/{lemma}/{query}"
            count = len(senses)
            items.append(Item(f"{ACCURACY}{suffix}", lemma, name, accuracy, 1 / count))
            items.append(Item(f"{RANK}{suffix}", lemma, name, rank, float(np.mean(1 / np.arange(1, count + 1)))))
    return items


def scores_of(similarities: np.ndarray, right: int) -> tuple[float, float]:
    """Whether the right candidate comes first, and one by its rank; the mean over the orders of equal ones."""
    before = int((similarities > similarities[right]).sum())
    equal = int((similarities == similarities[right]).sum())
    return float(not before) / equal, float(np.mean(1 / (before + np.arange(1, equal + 1))))
