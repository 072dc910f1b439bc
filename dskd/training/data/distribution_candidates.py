"""Candidate rows: the rows of the sense dictionary over which teacher and student are compared at a position
(`loss.sense_form: distribution`). Annotation has its own candidates, see :mod:`dskd.shards.search`.

Some candidates are rows that annotation found for the position, others are random. Without random rows, a position
whose few rows all have similar meanings would give no training signal. Random rows are drawn once per step from the
whole dictionary: a micro-batch holds them once for all its positions, and the loss is one matrix product with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dskd.config import LossConfig
from dskd.random_numbers import random_bits
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS

_COLUMNS = {"own": OWN_ROWS, "synonym": SYNONYM_ROWS, "antonym": ANTONYM_ROWS}


def most_candidates(loss: LossConfig, kappa: int) -> tuple[int, int]:
    """Returns the largest numbers of candidates with this loss: C of each position, and S that are drawn for all."""
    of_all = loss.sense_random_candidates if "random" in loss.sense_candidates else 0
    return kappa * len(_COLUMNS.keys() & set(loss.sense_candidates)), of_all


@dataclass(frozen=True)
class CandidateRows:
    """The rule that selects candidate rows: a function of seed, step and sample, not of rank or micro-batch."""

    seed: int
    kinds: tuple[str, ...]  # of `loss.sense_candidates`
    num_random: int
    num_rows: int  # of the dictionary

    @classmethod
    def of(cls, loss: LossConfig, seed: int, num_rows: int) -> "CandidateRows":
        """Returns the rule for a run with this loss."""
        return cls(seed, loss.sense_candidates, loss.sense_random_candidates, num_rows)

    def draw(self, step: int) -> np.ndarray:
        """Returns the row numbers [S], ascending and without duplicates, that are candidates at every position of a
        step.
        """
        if "random" not in self.kinds or not self.num_rows:
            return np.empty(0, dtype=np.int64)
        return np.unique(random_bits(self.seed, step, torch.arange(self.num_random)).numpy() % self.num_rows)

    def rows_at(self, sample: Mapping[str, np.ndarray], positions: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Returns the row numbers [n, C] specific to each position, padded with -1; none repeats or is in `drawn`."""
        columns = [sample[column][positions] for kind, column in _COLUMNS.items() if kind in self.kinds]
        if not columns:
            return np.empty((len(positions), 0), dtype=np.int64)
        rows = np.sort(np.concatenate(columns, axis=-1).astype(np.int64), axis=-1)
        is_duplicate = rows[:, 1:] == rows[:, :-1]
        rows[:, 1:][is_duplicate] = -1
        rows[np.isin(rows, drawn)] = -1
        return rows
