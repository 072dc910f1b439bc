"""The choice of a sample's positions that get a sense term (docs/method.md, section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dskd.config import LossConfig
from dskd.random_numbers import random_bits
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS

_RELATION_DRAW, _OWN_DRAW = 0, 1


@dataclass(frozen=True)
class SensePositions:
    """The rule that selects the positions with a sense term, as a function of seed, epoch and sample alone."""

    seed: int
    relation_share: float
    min_relations: int

    @classmethod
    def of(cls, loss: LossConfig, seed: int) -> "SensePositions":
        """Returns the rule for a run with this loss."""
        return cls(seed, loss.relation_share, loss.min_relations)

    def number(self, lexical: int) -> int:
        """Returns the number of positions that the relation term gets of a sample with so many lexical ones."""
        return min(lexical, max(round(self.relation_share * lexical), self.min_relations))

    def draw(self, sample: Mapping[str, np.ndarray], sample_id: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws positions for the relation term and for the own term; both are ascending.

        The relation term gets `relation_share` of the positions whose target has a synonym or antonym, but at least
        `min_relations` of them, or all if there are fewer. The own term gets the same number of the positions whose
        target has senses, or all if there are fewer.
        """
        counts = sample["loss_mask"].astype(bool)
        lexical = np.flatnonzero(counts & is_lexical(sample))
        own = np.flatnonzero(counts & (sample[OWN_ROWS][:, 0] >= 0))
        count = self.number(len(lexical))
        return (
            self._first(lexical, count, sample_id, epoch, _RELATION_DRAW),
            self._first(own, count, sample_id, epoch, _OWN_DRAW),
        )

    def _first(self, positions: np.ndarray, count: int, sample_id: int, epoch: int, draw: int) -> np.ndarray:
        priorities = random_bits(self.seed, draw, epoch, sample_id, torch.from_numpy(positions)).numpy()
        return np.sort(positions[np.argsort(priorities, kind="stable")[:count]])


def is_lexical(sample: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns a mask [T] bool of the positions whose target has a synonym or antonym."""
    return (sample[SYNONYM_ROWS][:, 0] >= 0) | (sample[ANTONYM_ROWS][:, 0] >= 0)
