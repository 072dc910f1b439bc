"""Samples in shard files that are not packed: their states are copied straight to the place where a step needs them.

States are nearly all bytes of a sample. A worker sends only where they are; its rank then copies them itself, from the
mapped file: reading the file took three times as long.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dskd.artifacts.mds import INDEX, read_index

_OPEN_FILES = 128  # that are mapped at once; each takes a file descriptor, of which most systems allow 1,024


@dataclass(frozen=True)
class SampleInFile:
    """The place of a sample in a shard file, what it must contain, and where its arrays of states are."""

    file: str
    file_size: int  # bytes
    number: int  # in its shard, counted from 0
    start: int  # byte offset in the file
    size: int  # bytes
    digest: bytes  # xxh3_64 of its bytes; empty if the index has none
    states: Mapping[str, tuple[int, int]]  # {column: (byte offset in the sample, bytes)}

    def require_content(self, *parts: Any) -> None:
        """Checks that `parts`, bytes or arrays, are the sample's bytes in order. Does nothing without a hash.

        Raises:
            ValueError: if they are not.
        """
        if not self.digest:
            return
        hasher = xxhash.xxh3_64()
        for part in parts:
            hasher.update(part)
        if hasher.digest() != self.digest:
            raise ValueError(f"{self.file} has changed: its sample {self.number} is not what the index says")


class MappedFiles:
    """The shard files that were mapped last. A map lives on as long as there are arrays in it."""

    def __init__(self) -> None:
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()

    def open(self, path: str, size: int) -> memoryview:
        """Maps a file of `size` bytes.

        Call this before each read: a file that was mapped can become shorter, and reading past its end would kill the
        process with a bus error.

        Raises:
            FileNotFoundError: if there is none; a dataset then fetches it.
            ValueError: if it has another size.
        """
        if path in self._maps:
            self._maps.move_to_end(path)
            _require_size(path, self._maps[path].size(), size)  # of the file now
            return memoryview(self._maps[path])
        with Path(path).open("rb") as file:
            _require_size(path, os.fstat(file.fileno()).st_size, size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[path] = mapped
        if len(self._maps) > _OPEN_FILES:
            self._maps.popitem(last=False)
        return memoryview(mapped)


def _require_size(path: str, actual: int, size: int) -> None:
    if actual != size:
        raise ValueError(f"{path} has {actual:,} bytes, but the index says {size:,}")


def find_changed_size(folder: Path) -> ValueError | None:
    """Returns the error of the first shard file of a folder that has another size than its index says.

    Files that are not there, because they have not been fetched or unpacked, are left out.
    """
    if not (folder / INDEX).is_file():
        return None
    for shard in read_index(folder / INDEX):
        file = folder / shard["raw_data"]["basename"]
        try:
            _require_size(str(file), file.stat().st_size, shard["raw_data"]["bytes"])
        except FileNotFoundError:
            continue
        except ValueError as error:
            return error
    return None


class SampleReader:
    """A reader of the states of samples."""

    def __init__(self) -> None:
        self._files = MappedFiles()

    def read_states(self, sample: SampleInFile, targets: Mapping[str, np.ndarray]) -> None:
        """Copies columns of states into `targets`, and compares the whole sample with its hash.

        A worker compared it, too. The bytes are compared once more where they are used, because the file can have been
        replaced in the meantime.

        Args:
            sample: the sample.
            targets: {column: bytes [n] uint8}. What does not fit is left out, and zeros follow a shorter column.

        Raises:
            ValueError: if the sample is not what the index says.
            OSError: if its file cannot be opened.
        """
        mapped = self._files.open(sample.file, sample.file_size)
        content = np.frombuffer(mapped, np.uint8, sample.size, sample.start)
        parts = []  # the sample's bytes in order, of states those that were copied
        end = 0
        for column, (start, size) in sorted(sample.states.items(), key=lambda item: item[1]):
            if column not in targets:
                continue
            target = targets[column]
            copied = target[:size]
            copied[:] = content[start : start + len(copied)]
            target[size:] = 0
            parts += [content[end:start], copied]
            end = start + len(copied)
        sample.require_content(*parts, content[end:])
