"""Collates samples of the shards into batches of tokens, and reads the dictionary rows that they point to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dskd.corpus.sequences import position_ids_of


def collate_tokens(samples: Sequence[Mapping[str, Any]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Collates samples of equal length into a batch of int64 and bool tensors.

    Returns:
        {input_ids [B, T], labels [B, T], loss_mask [B, T] bool, sample_ids [B]}, and `position_ids` [B, T] only if a
        document starts inside a sequence. T is `length`, or the samples' whole length if that is None.
    """
    whole = len(samples[0]["input_ids"])
    length = whole if length is None else length
    # Take one more token: it is the label of the last position.
    tokens = torch.from_numpy(np.stack([sample["input_ids"][: length + 1] for sample in samples])).long()
    labels = tokens[:, 1:] if length < whole else torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    position_ids = position_ids_of(torch.from_numpy(np.stack([s["document_starts"][:length] for s in samples])))
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return {
        "input_ids": tokens[:, :length],
        "labels": labels,
        "loss_mask": torch.from_numpy(np.stack([sample["loss_mask"][:length] for sample in samples])).bool(),
        "sample_ids": torch.tensor([sample["sample_id"] for sample in samples]),
        **positions,
    }


def gather_rows(vectors: np.ndarray, row_numbers: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Reads every row that `row_numbers` names, each only once.

    Args:
        vectors: [all rows, D], the raw bits of bf16.
        row_numbers: arrays of row numbers of any shape, padded with -1.

    Returns:
        The rows [R, D] bf16, and for each array of `row_numbers` the indices into these rows, int64 of the same shape,
        padded with -1.
    """
    used, indices = used_rows(row_numbers)
    return torch.from_numpy(np.take(vectors, used, axis=0)).view(torch.bfloat16), indices


def used_rows(row_numbers: Sequence[np.ndarray]) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Returns the row numbers [R] that `row_numbers` names, ascending, and the indices of :func:`gather_rows`."""
    flat = np.concatenate([numbers.ravel() for numbers in row_numbers])
    unique, inverse = np.unique(flat, return_inverse=True)
    padding = int(len(unique) > 0 and unique[0] < 0)
    inverse = inverse.reshape(-1) - padding  # if there is a -1, it is the first of `unique`
    pieces = np.split(inverse, np.cumsum([numbers.size for numbers in row_numbers])[:-1])
    indices = [
        torch.from_numpy(piece.reshape(numbers.shape)) for piece, numbers in zip(pieces, row_numbers, strict=True)
    ]
    return unique[padding:], indices
