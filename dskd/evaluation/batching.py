"""Batches of texts of different lengths for all ranks, for evaluations that only read: questions and sentences.

The longest texts come first, so that a lack of memory shows at once and there is little padding. The batches do not
depend on the number of ranks.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from dskd.distributed.world import World


def batches_by_length(lengths: Sequence[int], batch_size: int, world: World) -> Iterator[list[int]]:
    """Yields this rank's batches, each a list of text indices.

    Every rank gets the same number of batches; the last one may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for number in world.turns(len(batches)):
        yield [] if number is None else batches[number]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns token ids [B, T], padded with 0 on the right.

    A rank without texts still runs the model, on one token: when the model is sharded, the other ranks wait for it.
    """
    return pad_sequence([torch.tensor(row) for row in rows or [[0]]], batch_first=True)
