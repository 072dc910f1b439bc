"""Collation of samples into micro-batches: token ids, labels, masks, and the sense dictionary rows they point to.

The loader's workers draw the positions that get a sense term and look up their row numbers only; the rank reads the
rows that a micro-batch needs. The training step gathers from those rows or, if the device holds the whole dictionary,
from all rows by their numbers.

Shapes: B samples, T tokens, K = kappa, R rows of the sense dictionary in a batch, D hidden.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dskd.senses.dictionary import map_vectors
from dskd.shards.batches import collate_tokens, used_rows
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS, TEACHER_COLUMNS
from dskd.training.data.distribution_candidates import CandidateRows
from dskd.training.data.packed_step import RowsInFiles, RowsOfDictionary
from dskd.training.data.positions import SensePositions, TargetPositions, is_lexical

_LENGTH_MULTIPLE = 8  # of a micro-batch's length: tensor cores are fastest on multiples of 8


class Collator:
    """A function from a rank's samples of one optimizer step to its micro-batches.

    Samples are sorted by length, and each micro-batch is as long as its longest sample.
    """

    def __init__(
        self,
        vectors_path: Path | None,
        positions: SensePositions | None,
        *,
        micro_batch_size: int,
        candidates: CandidateRows | None = None,
        targets: TargetPositions | None = None,
        lexical: bool = False,
        teacher_cache: bool = False,
        states: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Sets what a micro-batch contains in addition to its tokens.

        Args:
            vectors_path: the sense dictionary's vectors, from which each micro-batch gets the rows it points to; None
                if micro-batches hold row numbers of the whole dictionary instead.
            positions: rule for which positions get a sense term; None if none do.
            micro_batch_size: samples per micro-batch.
            candidates: rule for the rows over which teacher and student are compared; None for the distance form,
                which uses the student's distances to rows.
            targets: rule for which positions get CE, KL and hidden-state distance; None if all with a target do.
            lexical: add a mask of the targets that have a synonym or antonym.
            teacher_cache: add the teacher's stored distributions.
            states: {column of the teacher's stored states to add: its type}.
        """
        self._vectors_path = vectors_path
        self._positions = positions
        self._micro_batch_size = micro_batch_size
        self._candidates = candidates
        self._targets = targets
        self._lexical = lexical
        self._teacher_cache = teacher_cache
        self._states = states or {}
        self._vectors: np.ndarray | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns micro-batches of B samples, trimmed to T tokens.

        Each holds the output of :func:`collate_tokens` and, if requested:

        `senses`: the arguments of :func:`dskd.losses.sense_distance.sense_loss` or, with `candidates`, of
        :func:`dskd.losses.sense_distribution.sense_divergence`, with positions into B·T. `sense_rows` [R, D] is a
        :class:`dskd.training.data.packed_step.RowsOfDictionary`. Without `vectors_path`, it is not among them, and
        indices are row numbers of the dictionary.

        `drawn_targets`: [B, T] bool, the positions with CE, KL and hidden-state distance.

        `lexical`: [B, T] bool.

        `teacher_cache`: {token_ids [B, T, n] int32, logprobs [B, T, n] float16, rest_logprob [B, T] float32}.

        the columns of `states`: [B, T, D] each, as :class:`dskd.training.data.packed_step.RowsInFiles`.
        """
        if self._vectors_path is not None and self._vectors is None:
            # Mapped here, in the worker: a memory map must not be sent to another process.
            self._vectors = map_vectors(self._vectors_path)
        # Longest first: a batch too large for the device fails at once, and later ones reuse the first one's memory.
        ordered = sorted(samples, key=lambda sample: -_real_length(sample))
        # One call for the whole step: NumPy takes longer to begin an operation than to compute it for a sample.
        drawn = [] if self._positions is None else self._positions.draw_each(ordered)
        size = self._micro_batch_size
        parts = [slice(start, start + size) for start in range(0, len(ordered), size)]
        batches = [self._collate(ordered[part], drawn[part]) for part in parts]
        if self._targets is not None:
            targets = torch.from_numpy(self._targets.draw_each(ordered))
            for batch, part in zip(batches, parts, strict=True):
                batch["drawn_targets"] = targets[part, : batch["loss_mask"].shape[1]]
        return batches

    def _collate(
        self, samples: Sequence[Mapping[str, Any]], drawn: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> dict[str, Any]:
        """Returns a micro-batch; `drawn` are its samples' positions with a sense term, if there are any."""
        length = _trimmed_length(samples)
        batch: dict[str, Any] = collate_tokens(samples, length)
        if self._positions is not None:
            named = _name_rows(samples, length, drawn, self._candidates)
            batch["senses"] = self._point_to_rows(named)
        if self._lexical:
            batch["lexical"] = torch.from_numpy(np.stack([is_lexical(sample)[:length] for sample in samples]))
        if self._teacher_cache:
            batch["teacher_cache"] = {
                name.removeprefix("teacher_"): torch.from_numpy(np.stack([sample[name][:length] for sample in samples]))
                for name in TEACHER_COLUMNS
            }
        for name, dtype in self._states.items():
            # States are nearly all bytes of a sample: the rank reads them itself, from where they are.
            width = samples[0][name].shape[1]
            batch[name] = RowsInFiles(name, [sample["in_file"] for sample in samples], (length, width), dtype)
        return batch

    def _point_to_rows(self, named: "_RowsByName") -> dict[str, Any]:
        """Converts to tensors; with vectors, adds the rows used and turns row numbers into indices into those rows."""
        positions, row_numbers = named
        rows = {}
        if self._vectors_path is None or self._vectors is None:
            indices = [torch.from_numpy(numbers).long() for numbers in row_numbers.values()]
        else:
            used, indices = used_rows(list(row_numbers.values()))
            # This brings the rows into the page cache, so that the rank does not wait for a disk.
            self._vectors[used, 0], self._vectors[used, -1]
            rows["sense_rows"] = RowsOfDictionary(self._vectors_path, used, self._vectors.shape[1])
        at = {name: torch.from_numpy(values) for name, values in positions.items()}
        return {**rows, **at, **dict(zip(row_numbers, indices, strict=True))}


def _real_length(sample: Mapping[str, Any]) -> int:
    """Returns the number of positions up to the last one whose target counts.

    In a causal model no loss depends on later positions.
    """
    counted = np.flatnonzero(sample["loss_mask"])
    return int(counted[-1]) + 1 if len(counted) else 0


def _trimmed_length(samples: Sequence[Mapping[str, Any]]) -> int:
    longest = max(1, *(_real_length(sample) for sample in samples))
    return min(len(samples[0]["input_ids"]), -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)


_RowsByName = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def _name_rows(
    samples: Sequence[Mapping[str, Any]],
    length: int,
    drawn: Sequence[tuple[np.ndarray, np.ndarray]],
    candidates: CandidateRows | None,
) -> _RowsByName:
    """Returns the inputs of a sense loss: {name: positions into B·T}, and {name: row numbers of the dictionary}."""
    if candidates is not None:
        # The union of both draws, so that the positions do not depend on the kinds of candidates.
        at = [np.union1d(*of_sample) for of_sample in drawn]
        shared = candidates.draw(samples[0]["step"])
        rows = [candidates.rows_at(sample, where, shared) for sample, where in zip(samples, at, strict=True)]
        return {"positions": _in_batch(at, length)}, {"candidate_rows": np.concatenate(rows), "random_rows": shared}
    relation, own = zip(*drawn, strict=True)

    def column(name: str, at: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([sample[name][where] for sample, where in zip(samples, at, strict=True)])

    return {"relation_positions": _in_batch(relation, length), "own_positions": _in_batch(own, length)}, {
        "synonym_rows": column(SYNONYM_ROWS, relation),
        "antonym_rows": column(ANTONYM_ROWS, relation),
        "own_rows": column(OWN_ROWS, own),
    }


def _in_batch(positions: Sequence[np.ndarray], length: int) -> np.ndarray:
    return np.concatenate([of_sample + number * length for number, of_sample in enumerate(positions)])
