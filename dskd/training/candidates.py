"""Candidates: the rows of the sense dictionary that teacher and student are compared over at a position
(`loss.sense_form: distribution`).

Beside rows that annotation found for the position there are random ones, without which a position whose few rows all
mean much the same would ask for nothing. Those are drawn once a step, from the whole dictionary: a micro-batch brings
them once for all of its positions, and the loss is one matrix product with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dskd.config import LossConfig
from dskd.random_numbers import random_bits

_COLUMNS = {"own": "sense_ids", "synonym": "synonym_ids", "antonym": "antonym_ids"}


@dataclass(frozen=True)
class Candidates:
    """Which rows those are: a function of seed, step and sample, not of the rank or the micro-batch."""

    seed: int
    kinds: tuple[str, ...]  # of `loss.sense_candidates`
    num_random: int
    num_rows: int  # of the dictionary

    @classmethod
    def of(cls, loss: LossConfig, seed: int, num_rows: int) -> "Candidates":
        """The rule of a run."""
        return cls(seed, loss.sense_candidates, loss.sense_random_candidates, num_rows)

    def draw(self, step: int) -> np.ndarray:
        """Row numbers [S], ascending, that are candidates at every position of a step; one drawn twice is one."""
        if "random" not in self.kinds or not self.num_rows:
            return np.empty(0, dtype=np.int64)
        return np.unique(random_bits(self.seed, step, torch.arange(self.num_random)).numpy() % self.num_rows)

    def of_positions(self, sample: Mapping[str, np.ndarray], positions: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Row numbers [n, C] of the positions themselves, padded with -1: no row twice, and none of those drawn."""
        columns = [sample[column][positions] for kind, column in _COLUMNS.items() if kind in self.kinds]
        if not columns:
            return np.empty((len(positions), 0), dtype=np.int64)
        rows = np.sort(np.concatenate(columns, axis=-1).astype(np.int64), axis=-1)
        again = rows[:, 1:] == rows[:, :-1]
        rows[:, 1:][again] = -1
        rows[np.isin(rows, drawn)] = -1
        return rows
