"""`dskd senses geometry`: a measurement of how well the teacher's space separates synonyms from antonyms.

The sense loss can teach no more than this space contains. Antonyms occur in the same contexts as synonyms, and in many
teachers they are equally near. With such a teacher, pulling a student to synonyms and pushing it away from antonyms
teaches it nothing about the difference, so measure before training.

Here a word is the mean of its sense embeddings, weighted by the numbers of states they were made from. For heads with
both a synonym and an antonym, each comparison counts how often the first of two words is nearer to the head; chance is
.5. Words are single tokens, because the rows of longer ones are made from states of other words.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from dskd.config import Config
from dskd.console import table
from dskd.errors import UserError
from dskd.evaluation.scores_by_example import standard_error
from dskd.lexicon.relations import RELATIONS
from dskd.senses.dictionary import SenseDictionary, load_dictionary

OTHERS = 64  # up to this many unrelated words are compared with each head's synonyms and antonyms
COMPARISONS = ("synonym nearer than antonym", "synonym nearer than another word", "antonym nearer than another word")
DISTANCES = ("L2", "cosine")


class Share(NamedTuple):
    """The mean, over heads, of the share of pairs in which the first word is nearer."""

    value: float
    standard_error: float | None  # over heads; None if there are fewer than two
    heads: int  # number of heads


def report_geometry(config: Config) -> None:
    """Prints the shares for the config's sense dictionary. Raises a UserError when there is none, or no head in it has
    both a synonym and an antonym.
    """
    dictionary, _ = load_dictionary(config)
    shares = measure_geometry(dictionary, seed=config.seed)
    if shares is None:
        raise UserError(
            f"{dictionary.path}: no word has senses, and a synonym and an antonym of one token with senses; the corpus "
            "or the lexicon is too small"
        )
    rows = [[name, *(_shown(shares[distance][name]) for distance in DISTANCES)] for name in COMPARISONS]
    heads = shares[DISTANCES[0]][COMPARISONS[0]].heads
    print(
        f"{dictionary.path}: {heads} words with both synonyms and antonyms; chance is .500, ± is the standard error\n"
    )
    print(table(["", *DISTANCES], rows))


def measure_geometry(dictionary: SenseDictionary, *, seed: int) -> dict[str, dict[str, Share]] | None:
    """Returns {distance: {comparison: share}}, or None if no head has both a synonym and an antonym. `seed` draws the
    other words, from the heads with relations.
    """
    # Heads with both relations, and all words whose means are needed; tokens without senses are left out.
    neighbours = [_neighbours(dictionary, relation) for relation in RELATIONS]
    has_senses = dictionary.senses_per_token > 0
    related = {token for of in neighbours for token in of} & set(has_senses.nonzero().flatten().tolist())
    heads = sorted(token for token in related if all(token in of for of in neighbours))
    words = sorted(related.union(*(of[head] for of in neighbours for head in heads)))
    if not heads:
        return None
    row_of = {word: number for number, word in enumerate(words)}
    centroids = _centroids(dictionary, words)
    generator = np.random.default_rng(seed)
    pool = np.array(sorted(related))
    shares: dict[str, dict[str, list[float]]] = {d: {name: [] for name in COMPARISONS} for d in DISTANCES}
    # For each head draw unrelated words, and compare the distances of the three groups pairwise.
    for head in heads:
        synonyms, antonyms = (of[head] for of in neighbours)
        others = sorted(set(generator.choice(pool, min(OTHERS, len(pool)), replace=False).tolist()))
        others = [word for word in others if word not in {head, *synonyms, *antonyms}]
        groups = [centroids[[row_of[word] for word in group]] for group in (synonyms, antonyms, others)]
        for distance in DISTANCES:
            near = [_distances(centroids[row_of[head]], group, distance) for group in groups]
            for name, (one, other) in zip(COMPARISONS, ((0, 1), (0, 2), (1, 2)), strict=True):
                if len(near[other]):
                    shares[distance][name].append(_share_nearer(near[one], near[other]))
    return {d: {name: _mean(values) for name, values in of.items()} for d, of in shares.items()}


def _neighbours(dictionary: SenseDictionary, relation: str) -> dict[int, list[int]]:
    """Returns, for each head, its neighbours that are single tokens and have senses."""
    neighbours = dictionary.entries.neighbours(relation)
    entries = neighbours.values.long()
    kept = (entries < dictionary.vocab_size) & (dictionary.senses_per_entry[entries] > 0)
    by_head: dict[int, list[int]] = {}
    for head, entry in zip(neighbours.owners[kept].tolist(), entries[kept].tolist(), strict=True):
        by_head.setdefault(head, []).append(entry)
    return by_head


def _centroids(dictionary: SenseDictionary, tokens: list[int]) -> torch.Tensor:
    """Returns the mean [n, D] of each token's rows, weighted by the numbers of states they were made from."""
    centroids = torch.empty(len(tokens), dictionary.hidden_size)
    for number, token in enumerate(tokens):
        rows = dictionary.rows_of(token)
        weights = dictionary.counts[rows.start : rows.stop].clamp(min=1).float()
        centroids[number] = (weights @ dictionary.read(rows).float()) / weights.sum()
    return centroids


def _distances(one: torch.Tensor, others: torch.Tensor, distance: str) -> torch.Tensor:
    if distance == "cosine":
        return 1 - F.cosine_similarity(one[None], others)
    return (others - one).square().mean(dim=-1)


def _share_nearer(near: torch.Tensor, far: torch.Tensor) -> float:
    """Returns the share of pairs (one distance of each tensor) in which the first is smaller; a tie counts as half."""
    difference = far[None, :] - near[:, None]
    return float((0.5 + 0.5 * difference.sign()).mean())


def _mean(values: list[float]) -> Share:
    if not values:
        return Share(math.nan, None, 0)
    return Share(float(np.mean(values)), standard_error(np.array(values), np.ones(len(values))), len(values))


def _shown(share: Share) -> str:
    if not share.heads:
        return "none"
    error = "" if share.standard_error is None else f" ± {share.standard_error:.3f}"
    return f"{share.value:.3f}{error}".replace("0.", ".")
