"""Samples in shard files that are not packed: their states are read straight to the place where a step needs them.

States are nearly all bytes of a sample. A worker sends only where they are; its rank then reads them itself.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

_OPEN_FILES = 128  # of a reader; most systems allow a process 1,024


@dataclass(frozen=True)
class SampleInFile:
    """The place of a sample in a shard file, what it must contain, and where its arrays of states are."""

    file: str
    number: int  # in its shard, counted from 0
    start: int  # byte offset in the file
    size: int  # bytes
    digest: bytes  # xxh3_64 of its bytes; empty if the index has none
    states: Mapping[str, tuple[int, int]]  # {column: (byte offset in the sample, bytes)}

    def require_content(self, *parts: memoryview | np.ndarray) -> None:
        """Checks that `parts`, one after the other, are the sample's bytes; without a hash in the index, does nothing.

        Raises:
            ValueError: if they are not.
        """
        if not self.digest:
            return
        found = xxhash.xxh3_64()
        for part in parts:
            found.update(part)
        if found.digest() != self.digest:
            name = Path(self.file).name
            raise ValueError(f"{name} has changed: its sample {self.number} is not what the index says")


class SampleReader:
    """A reader of samples that keeps the shard files open that it read last. Only one thread may use it."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()  # {path: file descriptor}

    def read_states(self, sample: SampleInFile, targets: Mapping[str, np.ndarray]) -> None:
        """Reads columns of states into `targets`, and compares the whole sample with its hash.

        A worker compared it, too. The bytes are compared once more where they are used, because the file can have been
        replaced in the meantime.

        Args:
            sample: the sample.
            targets: {column: bytes [n] uint8}. What does not fit is left out, and zeros follow a shorter column.

        Raises:
            ValueError: if the sample is not what the index says.
            OSError: if it cannot be read.
        """
        parts = []
        end = 0
        for column, (start, size) in sorted(sample.states.items(), key=lambda item: item[1]):
            parts.append(np.empty(start - end, np.uint8))
            target = targets.get(column, np.empty(0, np.uint8))
            parts += [target[:size], np.empty(max(0, size - len(target)), np.uint8)]
            target[size:] = 0
            end = start + size
        parts.append(np.empty(sample.size - end, np.uint8))
        _read(self._open(sample.file), sample.start, parts, sample.file)
        sample.require_content(*parts)

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, path: str) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[path]


def _read(file: int, offset: int, parts: Sequence[np.ndarray], name: str) -> None:
    """Fills `parts`, one after the other, with the bytes of a file from `offset` on."""
    left = [memoryview(part) for part in parts if len(part)]
    while left:
        count = os.preadv(file, left, offset)
        if not count:
            raise ValueError(f"{Path(name).name} has {offset:,} bytes, and the index says more")
        offset += count
        # A call reads less than 2 GiB, and a network's file system can return less than it was asked for.
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]
