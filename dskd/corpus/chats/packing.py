"""Packs chats into sequences of equal length. A chat is never cut: the rest of a sequence is padded.

| packing | a sequence holds | attention and positions start again |
|---|---|---|
| documents | whole chats | at each chat |
| stream | whole chats | at each sequence |
| none | one chat | at each sequence |

Several chats are packed by best fit: the longest first, each into the fullest sequence that has room for it. Shapes:
n tokens of a chat, S sequences, T tokens of a sequence.
"""

import bisect
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dskd.console import progress_bar
from dskd.corpus.packing import Packed, write_sequences

_BATCH_TOKENS = 2_000_000
_BATCH_SEQUENCES = 64

# The token ids of a chat [n] int32, and 1 where a token counts in the loss [n] uint8.
Tokens = tuple[np.ndarray, np.ndarray]


def pack_chats(
    chats: Iterator[Tokens],
    path: Path,
    *,
    sequence_length: int,
    packing: str,
    padding: int,
    max_sequences: int | None = None,
) -> Packed:
    """Writes chats, none of which is longer than `sequence_length`, as sequences.

    `path` is the safetensors file to write, as :func:`dskd.corpus.packing.pack` does, with one more tensor: `counted`
    [S, T] uint8, 1 for tokens that count in the loss as targets.
    """
    count = num_counted = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent))
        spool = {
            name: stack.enter_context(Path(folder, name).open("w+b"))
            for name in ("input_ids", "starts", "lengths", "counted")
        }
        bar = stack.enter_context(progress_bar(total=None, label="packing", unit="sequences"))
        while max_sequences is None or count < max_sequences:
            left = None if max_sequences is None else max_sequences - count
            batch = _take(chats, sequence_length, packing, left)
            if not batch:
                break
            sizes = [len(tokens) for tokens, _ in batch]
            rows = [[number] for number in range(len(batch))] if packing == "none" else best_fit(sizes, sequence_length)
            for row in rows[:left]:
                tokens, counted = (np.concatenate([batch[number][part] for number in row]) for part in (0, 1))
                starts = np.zeros(sequence_length, np.uint8)
                if packing == "documents":
                    starts[np.cumsum([0, *(sizes[number] for number in row[:-1])])] = 1
                rest = (0, sequence_length - len(tokens))
                np.pad(tokens, rest, constant_values=padding).tofile(spool["input_ids"])
                np.pad(counted, rest).tofile(spool["counted"])
                starts.tofile(spool["starts"])
                np.array([len(tokens)], np.int32).tofile(spool["lengths"])
                num_counted += int(counted.sum())
            count += len(rows[:left])
            bar.update(len(rows[:left]))
        packed = write_sequences(path, spool, count * sequence_length, sequence_length, padding)
        return packed._replace(counted=num_counted)


def _take(chats: Iterator[Tokens], sequence_length: int, packing: str, left: int | None) -> list[Tokens]:
    """Returns the next chats: enough for many sequences, but not for more than `left` of them.

    So a limit keeps the first chats. If all were packed together, it would keep the longest.
    """
    most = max(_BATCH_TOKENS, _BATCH_SEQUENCES * sequence_length)
    if left is not None:
        most = min(most, left * sequence_length)
    batch: list[Tokens] = []
    size = 0
    while size < most and (chat := next(chats, None)) is not None:
        batch.append(chat)
        size += sequence_length if packing == "none" else len(chat[0])
    return batch


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Returns groups of indices into `sizes`, each with a sum of at most `room`; no single size exceeds it.

    Groups and their indices are in the order of `sizes`, as far as possible: a group has the place of its first index.
    """
    groups: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # the room left in each group, and the group, in ascending order
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        at = bisect.bisect_left(spaces, (sizes[index], -1))
        if at < len(spaces):
            space, group = spaces.pop(at)
        else:
            space, group = room, len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(spaces, (space - sizes[index], group))
    return sorted(map(sorted, groups))
