"""The blocks that annotation writes: their sizes, folders and format, and the thread that writes them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dskd.config import AnnotationConfig
from dskd.shards.schema import LARGEST_SHARD, SHARD_HEADER, StoredStates, columns_of, sample_bytes
from dskd.shards.writing import ShardFormat

_MIN_BLOCKS = 16  # a small corpus is cut into up to this many blocks, so that several ranks have work
# Samples that a shard with states has at least. A sequence of 2,048 tokens with states of 4,096 values has 34 MB. With
# one or two of these in a shard, a corpus of a billion tokens would have hundreds of thousands of files, which
# mosaicml-streaming lists in memory on every rank.
SAMPLES_PER_SHARD = 8


def blocks_of(num_sequences: int, sequence_length: int, settings: AnnotationConfig, teacher_top_n: int) -> list[range]:
    """Splits the sequences into ranges, one per shard or, with stored states, per several shards.

    All but the last have the same size, which depends only on these arguments. It does not depend on stored states: a
    block is what an interruption loses, and the teacher reads no batch beyond the end of a block.
    """
    size_of_sample = sample_bytes(sequence_length, kappa=settings.kappa, teacher_top_n=teacher_top_n)
    by_size = settings.shard_size_mb * 2**20 // size_of_sample
    size = max(1, min(by_size, -(-num_sequences // _MIN_BLOCKS)))
    return [range(start, min(start + size, num_sequences)) for start in range(0, num_sequences, size)]


def shard_format_of(
    settings: AnnotationConfig, sequence_length: int, teacher_top_n: int, stored: StoredStates | None
) -> ShardFormat:
    """Returns the format of the shards; with states, a block has several, which are not compressed.

    States hardly compress (benchmarks/README.md), and training maps files that are not packed instead of unpacking a
    second copy.
    """
    columns = columns_of(teacher_top_n=teacher_top_n, stored=stored)
    if stored is None:
        return ShardFormat(columns)
    size = sample_bytes(sequence_length, kappa=settings.kappa, teacher_top_n=teacher_top_n, stored=stored)
    most = max(settings.shard_size_mb * 2**20, SAMPLES_PER_SHARD * size) + SHARD_HEADER
    return ShardFormat(columns, compression=None, most_bytes=min(most, LARGEST_SHARD))


def block_folder(folder: Path, block: range) -> Path:
    """Returns the folder of a block until the blocks in `folder`, an artifact under construction, are joined."""
    return folder / ".blocks" / f"{block.start:012d}"


class WritingThread:
    """A thread that writes while the caller continues; a new call waits until the thread has done the one before."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None

    def submit(self, call: Callable[..., None], *args: Any) -> None:
        """Starts a call once the one before has ended, and raises the error that ended it."""
        self.wait()
        self._running = self._thread.submit(call, *args)

    def wait(self) -> None:
        """Waits until the last call has ended, and raises the error that ended it."""
        if self._running is not None:
            self._running.result()

    def __enter__(self) -> "WritingThread":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()
