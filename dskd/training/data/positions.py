"""The choice of a sample's positions that get a term of the loss (docs/method.md, section 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dskd.config import LossConfig
from dskd.random_numbers import random_bits, uniform
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS

_RELATION_DRAW, _OWN_DRAW = 0, 1
_NUMBER_DRAW, _TARGET_DRAW = 0, 1


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
        """Returns the number of positions that the relation term gets of a sample with this many lexical ones."""
        return min(lexical, max(round(self.relation_share * lexical), self.min_relations))

    def draw(self, sample: Mapping[str, np.ndarray], sample_id: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws positions for the relation term and for the own term; both are ascending.

        The relation term gets `relation_share` of the positions whose target has a synonym or antonym, but at least
        `min_relations` of them, or all if there are fewer. The own term gets the same number of the positions whose
        target has senses, or all if there are fewer.
        """
        (drawn,) = self.draw_each([{**sample, "sample_id": sample_id, "epoch": epoch}])
        return drawn

    def draw_each(self, samples: Sequence[Mapping[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Draws the positions of samples of equal length; :meth:`draw` does it for one."""
        counted = np.stack([sample["loss_mask"] for sample in samples]).astype(bool)
        lexical = counted & np.stack([is_lexical(sample) for sample in samples])
        own = counted & (np.stack([sample[OWN_ROWS][:, 0] for sample in samples]) >= 0)
        numbers = [self.number(count) for count in lexical.sum(1).tolist()]
        of_samples = [torch.tensor([[int(sample[name])] for sample in samples]) for name in ("epoch", "sample_id")]
        positions = torch.arange(counted.shape[1])
        columns = [
            [
                _lowest(np.flatnonzero(candidates), priorities, number)
                for candidates, priorities, number in zip(
                    of_draw, random_bits(self.seed, draw, *of_samples, positions).numpy(), numbers, strict=True
                )
            ]
            for draw, of_draw in ((_RELATION_DRAW, lexical), (_OWN_DRAW, own))
        ]
        return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class TargetPositions:
    """The rule that selects the positions with CE, KL and hidden-state distance (`loss.position_share`).

    It is a function of seed, epoch and sample alone.
    """

    seed: int
    share: float

    def draw_each(self, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Returns a mask [S, T] bool of the positions that are drawn of S samples of equal length."""
        counted = np.stack([sample["loss_mask"] for sample in samples]).astype(bool)
        epochs, sample_ids = (
            torch.tensor([int(sample[name]) for sample in samples]) for name in ("epoch", "sample_id")
        )
        return draw_share(counted, self.share, self.seed, epochs, sample_ids)


def draw_share(counted: np.ndarray, share: float, seed: int, *of_samples: torch.Tensor) -> np.ndarray:
    """Draws a share of the positions of each sample.

    Of n positions, share · n are drawn, rounded up or down at random so that their expected number is share · n, and
    each subset of that size is equally likely. So every position is drawn with the same probability, `share`, the mean
    over drawn positions estimates that over all of them, and a step always has about the same number. No sample with
    positions is left without any: of one with n < 1 / share, exactly one is drawn, with probability 1 / n each.

    Args:
        counted: [S, T] bool, the positions to draw from.
        share: more than 0, at most 1.
        seed: of the draw.
        of_samples: coordinates of the draw, [S] int64 each, such as epoch and sample id: what is drawn of a sample
            depends on the sample's own alone.

    Returns:
        A mask [S, T] bool.
    """
    up = uniform(seed, _NUMBER_DRAW, *of_samples).numpy()
    numbers = np.maximum(np.floor(share * counted.sum(1) + up), 1).astype(int).tolist()
    places = torch.arange(counted.shape[1])
    priorities = random_bits(seed, _TARGET_DRAW, *(of_each.unsqueeze(-1) for of_each in of_samples), places).numpy()
    drawn = np.zeros_like(counted)
    for row, number in enumerate(numbers):
        drawn[row, _lowest(np.flatnonzero(counted[row]), priorities[row], number)] = True
    return drawn


def _lowest(positions: np.ndarray, priorities: np.ndarray, count: int) -> np.ndarray:
    """Returns the `count` of ascending `positions` whose `priorities` [T] are lowest; of equal ones, the first."""
    if count >= len(positions):
        return positions
    of_positions = priorities[positions]
    highest = np.partition(of_positions, count)[count]  # of those that are left out, the lowest
    lower = positions[of_positions < highest]
    if len(lower) == count:
        return lower
    return np.sort(positions[np.argsort(of_positions, kind="stable")[:count]])


def is_lexical(sample: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns a mask [T] bool of the positions whose target has a synonym or antonym."""
    return (sample[SYNONYM_ROWS][:, 0] >= 0) | (sample[ANTONYM_ROWS][:, 0] >= 0)
