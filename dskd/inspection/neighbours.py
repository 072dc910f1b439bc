"""Finding the entries of the sense dictionary nearest to some of its rows, by L2, the distance of the method."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dskd.console import progress
from dskd.senses.dictionary import SenseDictionary

_CHUNK_ELEMENTS = 16_000_000  # elements of vectors held at once: 64 MB as float32
_CHUNKS_WITHOUT_A_BAR = 8


@dataclass(frozen=True)
class Neighbour:
    """An entry, with the distance |s - s'| from a row to the nearest row of the entry."""

    entry: int
    distance: float


def nearest_entries(
    dictionary: SenseDictionary, rows: range, count: int, *, without: int, chunk_elements: int = _CHUNK_ELEMENTS
) -> list[list[Neighbour]]:
    """Finds, for each of `rows`, the `count` nearest entries, nearest first; of equally near ones, the lower first.

    The entry `without`, to which the rows belong, is left out. Every vector is read once, `chunk_elements` elements at
    a time, since the file may be larger than memory.
    """
    entry_of_row = torch.arange(dictionary.entries.num_entries).repeat_interleave(dictionary.senses_per_entry)
    queries = dictionary.read(rows).float()
    nearest = torch.full((len(rows), dictionary.entries.num_entries), torch.inf)
    step = max(1, chunk_elements // dictionary.hidden_size)
    blocks = range(0, dictionary.num_rows, step)
    starts: Iterable[int] = blocks
    if len(blocks) > _CHUNKS_WITHOUT_A_BAR:
        starts = progress(blocks, total=len(blocks), label="nearest entries", unit="blocks of rows")
    for first in starts:
        chunk = dictionary.read(range(first, min(first + step, dictionary.num_rows))).float()
        # By default cdist may use a matrix product, which loses small distances to rounding.
        distances = torch.cdist(queries, chunk, compute_mode="donot_use_mm_for_euclid_dist")
        owners = entry_of_row[first : first + len(chunk)].expand(len(rows), -1)
        nearest.scatter_reduce_(1, owners, distances, "amin")
    nearest[:, without] = torch.inf
    distances, order = nearest.sort(dim=-1, stable=True)
    return [
        [Neighbour(entry, distance) for entry, distance in zip(entries, row, strict=True) if distance < torch.inf]
        for entries, row in zip(order[:, :count].tolist(), distances[:, :count].tolist(), strict=True)
    ]
