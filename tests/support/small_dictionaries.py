"""Sense dictionaries that tests make by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dskd.lexicon.relations import Pairs, Relation
from dskd.senses.dictionary import SenseDictionary, read_dictionary
from dskd.senses.entries import Entries, build_entries

WORDS = ["big", "large", "huge", "small", "of", "very", "the", "size", "x2y", "tiny"]


def save_dictionary(
    path: Path, vectors: torch.Tensor, counts: torch.Tensor, entry_offsets: torch.Tensor, entries: Entries
) -> None:
    """Writes a dictionary's file from `vectors` [R, D], stored as bf16, `counts` [R] and `entry_offsets` [E+1]."""
    tensors = {"vectors": vectors.to(torch.bfloat16), "counts": counts, "entry_offsets": entry_offsets}
    save_file({name: tensor.contiguous() for name, tensor in (tensors | entries.tensors()).items()}, path)


def all_vectors(dictionary: SenseDictionary) -> torch.Tensor:
    """Returns all vectors [R, D] bf16 of a dictionary."""
    return dictionary.read(range(dictionary.num_rows))


def make_dictionary(
    folder: Path,
    tokenizer: Any,
    pairs: Sequence[str],
    sizes: Mapping[int, int],
    vectors: torch.Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[SenseDictionary, dict[str, Any]]:
    """Makes a dictionary with the entries of the pairs, `HEAD|TAIL|RELATION`; also returns the facts about them.

    `sizes` is {entry: number of its rows}. By default vectors are random, and row r has r + 1 states.
    """
    relations = Pairs(Relation(*pair.split("|"), "test") for pair in pairs).resolved()
    entries, facts = build_entries(relations, tokenizer, len(tokenizer))
    numbers = torch.tensor([sizes.get(entry, 0) for entry in range(entries.num_entries)])
    offsets = torch.nn.functional.pad(numbers.cumsum(0), (1, 0))
    rows = int(offsets[-1])
    if vectors is None:
        vectors = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    of_rows = torch.arange(1, rows + 1) if counts is None else torch.tensor(counts)
    save_dictionary(folder / "senses.safetensors", vectors.bfloat16(), of_rows, offsets, entries)
    return read_dictionary(folder / "senses.safetensors"), facts
