"""Sense dictionaries that tests make by hand."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from dskd.senses.dictionary import SenseDictionary
from dskd.senses.entries import Entries


def save_dictionary(
    path: Path, vectors: torch.Tensor, counts: torch.Tensor, entry_offsets: torch.Tensor, entries: Entries
) -> None:
    """Writes a dictionary's file from `vectors` [R, D], stored as bf16, `counts` [R] and `entry_offsets` [E+1]."""
    tensors = {"vectors": vectors.to(torch.bfloat16), "counts": counts, "entry_offsets": entry_offsets}
    save_file({name: tensor.contiguous() for name, tensor in (tensors | entries.tensors()).items()}, path)


def all_vectors(dictionary: SenseDictionary) -> torch.Tensor:
    """Returns all vectors [R, D] bf16 of a dictionary."""
    return dictionary.read(range(dictionary.num_rows))
