"""Samples to batches: token ids, labels and masks, and the rows of the sense dictionary that they point to.

The loader's workers draw the positions that get a sense term, look up nothing but row numbers, and put the rows a
micro-batch needs beside its token ids: the training step gathers from those, or, by row number, from all rows if the
device holds them.

Shapes: B samples, T tokens, K = kappa, R rows of the sense dictionary in a batch, D hidden.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dskd.senses.dictionary import map_vectors
from dskd.shards.batches import collate_tokens, gather_rows
from dskd.shards.schema import TEACHER_COLUMNS
from dskd.training.candidates import Candidates
from dskd.training.positions import SensePositions, is_lexical

_LENGTH_MULTIPLE = 8  # lengths of micro-batches: what tensor cores like


class Collator:
    """A rank's samples of one optimizer step to its micro-batches: sorted by length, each as long as its longest."""

    def __init__(
        self,
        vectors_path: Path | None,
        positions: SensePositions | None,
        *,
        micro_batch_size: int,
        candidates: Candidates | None = None,
        lexical: bool = False,
        teacher_cache: bool = False,
    ) -> None:
        """What comes with the tokens.

        Args:
            vectors_path: the sense dictionary, to read the rows from that a micro-batch points to; None: it points
                into the whole dictionary.
            positions: which positions get a sense term; None: none do.
            micro_batch_size: samples a micro-batch.
            candidates: which rows teacher and student are compared over; None: the student's distances to rows count.
            lexical: bring which targets have a synonym or antonym.
            teacher_cache: bring the teacher's stored distributions.
        """
        self._vectors_path = vectors_path
        self._positions = positions
        self._micro_batch_size = micro_batch_size
        self._candidates = candidates
        self._lexical = lexical
        self._teacher_cache = teacher_cache
        self._vectors: np.ndarray | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Micro-batches of B samples, trimmed to T tokens: what :func:`collate_tokens` gives, and as asked for.

        `senses`: the tensors that :func:`dskd.losses.sense_distance.sense_loss` takes, or with `candidates` those that
        :func:`dskd.losses.sense_distribution.sense_divergence` takes, with positions into B·T. Without `vectors_path`
        `sense_rows` [R, D] is not among them, and indices are row numbers of the dictionary.

        `lexical`: [B, T] bool.

        `teacher_cache`: {token_ids [B, T, n] int32, logprobs [B, T, n] float16, rest_logprob [B, T] float32}.
        """
        if self._vectors_path is not None and self._vectors is None:
            self._vectors = map_vectors(self._vectors_path)  # in the worker: a map must not be sent to another process
        # The longest first: what does not fit the device fails at once, and later ones reuse its memory.
        ordered = sorted(samples, key=lambda sample: -_real_length(sample))
        size = self._micro_batch_size
        return [self._collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def _collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        length = _trimmed_length(samples)
        batch: dict[str, Any] = collate_tokens(samples, length)
        if self._positions is not None:
            named = _name_rows(samples, length, self._positions, self._candidates)
            batch["senses"] = _point_to_rows(named, self._vectors)
        if self._lexical:
            batch["lexical"] = torch.from_numpy(np.stack([is_lexical(sample)[:length] for sample in samples]))
        if self._teacher_cache:
            batch["teacher_cache"] = {
                name.removeprefix("teacher_"): torch.from_numpy(np.stack([sample[name][:length] for sample in samples]))
                for name in TEACHER_COLUMNS
            }
        return batch


def _real_length(sample: Mapping[str, Any]) -> int:
    """Positions up to the last one whose target counts: no loss depends on what follows in a causal model."""
    counted = np.flatnonzero(sample["loss_mask"])
    return int(counted[-1]) + 1 if len(counted) else 0


def _trimmed_length(samples: Sequence[Mapping[str, Any]]) -> int:
    longest = max(1, *(_real_length(sample) for sample in samples))
    return min(len(samples[0]["input_ids"]), -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)


_RowsByName = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def _name_rows(
    samples: Sequence[Mapping[str, Any]], length: int, rule: SensePositions, candidates: Candidates | None
) -> _RowsByName:
    """What a sense loss takes: {name: positions into B·T}, and {name: row numbers of the dictionary}."""
    drawn = [rule.draw(sample, sample["sample_id"], sample["epoch"]) for sample in samples]
    if candidates is not None:
        # Both draws, and a position of both once: with any candidates the positions are the same.
        at = [np.union1d(*of_sample) for of_sample in drawn]
        shared = candidates.draw(samples[0]["step"])
        rows = [candidates.of_positions(sample, where, shared) for sample, where in zip(samples, at, strict=True)]
        return {"positions": _in_batch(at, length)}, {"candidate_index": np.concatenate(rows), "random_index": shared}
    relation, own = zip(*drawn, strict=True)

    def column(name: str, at: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([sample[name][where] for sample, where in zip(samples, at, strict=True)])

    return {"relation_positions": _in_batch(relation, length), "own_positions": _in_batch(own, length)}, {
        "synonym_index": column("synonym_ids", relation),
        "antonym_index": column("antonym_ids", relation),
        "own_index": column("sense_ids", own),
    }


def _in_batch(positions: Sequence[np.ndarray], length: int) -> np.ndarray:
    return np.concatenate([of_sample + number * length for number, of_sample in enumerate(positions)])


def _point_to_rows(named: _RowsByName, vectors: np.ndarray | None) -> dict[str, torch.Tensor]:
    """The same as tensors; with `vectors` the rows are among them, and row numbers are indices into those."""
    positions, row_ids = named
    rows = {}
    if vectors is None:
        indices = [torch.from_numpy(ids).long() for ids in row_ids.values()]
    else:
        rows["sense_rows"], indices = gather_rows(vectors, list(row_ids.values()))
    at = {name: torch.from_numpy(values) for name, values in positions.items()}
    return {**rows, **at, **dict(zip(row_ids, indices, strict=True))}
