"""All samples of a step packed into one buffer, to which the rank adds what it reads itself; its copy to the device."""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from dskd.senses.dictionary import map_vectors
from dskd.shards.sample_files import SampleInFile, SampleReader

_ALIGNMENT = 16  # bytes; a multiple of every type's size
_ON_HOST = "sample_ids"  # stays in host memory: only messages need it


class Counts(NamedTuple):
    """The number of positions in a step that each term counts."""

    targets: int  # with CE, KL and hidden-state distance: all with a target, or those that are drawn of them
    senses: int  # with a sense term
    relations: int  # with the relation term, included in `senses`; 0 in the distribution form
    lexical: int  # of `targets`, those with a synonym or antonym; 0 if the batches do not mark them
    tokens: int  # with a target

    @property
    def own(self) -> int:
        """Number of positions with the own term of the distance form."""
        return self.senses - self.relations


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches that one rank runs in one optimizer step."""

    # Made by :class:`dskd.training.data.collator.Collator`; on the device, except for `sample_ids`.
    micro_batches: list[dict[str, Any]]
    counts: Counts  # of this rank


@dataclass(frozen=True)
class RowsInFiles:
    """A tensor [B, T, D] of states whose rows [T, D] are still in shard files."""

    column: str
    samples: Sequence[SampleInFile]
    row_shape: tuple[int, int]  # T, D; zeros follow a shorter row
    dtype: torch.dtype  # of the tensor; as large as that of the files' arrays, since NumPy has no bf16

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return (len(self.samples), *self.row_shape)


@dataclass(frozen=True)
class RowsOfDictionary:
    """A tensor [R, D] bf16 of rows of the sense dictionary that are still in its file."""

    path: Path
    numbers: np.ndarray  # [R], each a row of the file
    width: int  # D
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor."""
        return len(self.numbers), self.width

    def read(self) -> torch.Tensor:
        """Returns the tensor."""
        return torch.from_numpy(np.take(map_vectors(self.path), self.numbers, axis=0)).view(self.dtype)


class _Place(NamedTuple):
    """The place of a tensor in a buffer of bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Byte offset just after the tensor."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """Returns the tensor at this place of the buffer, as a view."""
        return buffer[self.start : self.stop].view(self.dtype).view(self.shape)


class StatesToRead(NamedTuple):
    """The states of a sample that a step still lacks."""

    sample: SampleInFile
    columns: dict[str, tuple[int, int]]  # {column: the first byte of its place in the buffer, and the byte after it}


class RowsToRead(NamedTuple):
    """The sense rows that a micro-batch still lacks, and their place in the buffer."""

    rows: RowsOfDictionary
    start: int
    stop: int


class FileReader:
    """A reader of what a rank reads itself: states in shard files, and rows of the sense dictionary."""

    def __init__(self) -> None:
        self.samples = SampleReader()
        self._vectors: dict[Path, np.ndarray] = {}

    def read_rows(self, rows: RowsOfDictionary, target: np.ndarray) -> None:
        """Copies the rows into `target`, bytes [n] uint8."""
        if rows.path not in self._vectors:
            self._vectors[rows.path] = np.asarray(map_vectors(rows.path))
        vectors = self._vectors[rows.path]
        # With "raise", NumPy would make a copy first. The worker has read these rows, so they exist.
        np.take(vectors, rows.numbers, axis=0, out=target.view(vectors.dtype).reshape(rows.shape), mode="clip")


@dataclass(frozen=True)
class PackedStep:
    """A :class:`StepBatches` whose tensors share one buffer."""

    buffer: torch.Tensor  # [bytes] uint8
    layout: list[dict[str, Any]]  # the micro-batches, with a `_Place` instead of each tensor
    sample_ids: list[list[int]]  # of each micro-batch
    counts: Counts
    # What still has to be read; the places are after the buffer's end.
    to_read: list[StatesToRead | RowsToRead]
    num_bytes: int  # of the buffer with all that has to be read

    @classmethod
    def of(cls, micro_batches: list[dict[str, Any]]) -> "PackedStep":
        """Packs micro-batches of tensors, :class:`RowsInFiles` and :class:`RowsOfDictionary`.

        A loader's worker packs the tensors into shared memory.
        """
        pieces: list[tuple[_Place, torch.Tensor]] = []
        size = 0

        def reserve(value: Any) -> Any:
            nonlocal size
            if isinstance(value, dict):
                return {name: reserve(part) for name, part in value.items() if not _is_left_out(name, part)}
            where = _Place(-(-size // _ALIGNMENT) * _ALIGNMENT, value.dtype, tuple(value.shape))
            size = where.stop
            if isinstance(value, torch.Tensor):
                pieces.append((where, value))
            return where

        layout = [reserve(batch) for batch in micro_batches]
        buffer = _empty_buffer(size)
        for where, value in pieces:
            where.view_of(buffer).copy_(value)
        # The places of states and sense rows come last, so the buffer that a worker sends need not have them.
        to_read: list[StatesToRead | RowsToRead] = []
        for batch, places in zip(micro_batches, layout, strict=True):
            rows = {name: value for name, value in batch.items() if isinstance(value, RowsInFiles)}
            places.update({name: reserve(value) for name, value in rows.items()})
            to_read += _states_to_read(rows, places)
            for name, value in batch.get("senses", {}).items():
                if isinstance(value, RowsOfDictionary):
                    where = places["senses"][name] = reserve(value)
                    to_read.append(RowsToRead(value, where.start, where.stop))
        sample_ids = [batch[_ON_HOST].tolist() for batch in micro_batches]
        return cls(buffer, layout, sample_ids, count_positions(micro_batches), to_read, size)

    def complete(self, reader: FileReader, buffers: "Buffers") -> "PackedStep":
        """Returns the step in a buffer that has its states and sense rows, too; `reader` reads them.

        Raises:
            ValueError: if a sample has changed; the message names it.
            OSError: if a file cannot be read.
        """
        buffer = buffers.take(self.num_bytes)
        buffer[: len(self.buffer)].copy_(self.buffer)
        content = buffer.numpy()
        for part in self.to_read:
            if isinstance(part, RowsToRead):
                reader.read_rows(part.rows, content[part.start : part.stop])
                continue
            targets = {name: content[start:stop] for name, (start, stop) in part.columns.items()}
            reader.samples.read_states(part.sample, targets)
        return replace(self, buffer=buffer, to_read=[])

    def unpack(self, sense_bank: torch.Tensor | None = None) -> StepBatches:
        """Returns the micro-batches as views of the buffer, with `sense_bank`, if given, as their sense rows."""

        def view(layout: Any) -> Any:
            if isinstance(layout, dict):
                return {name: view(part) for name, part in layout.items()}
            return layout.view_of(self.buffer)

        batches = [
            view(layout) | {_ON_HOST: torch.tensor(ids)}
            for layout, ids in zip(self.layout, self.sample_ids, strict=True)
        ]
        if sense_bank is not None:
            for batch in batches:
                batch["senses"]["sense_rows"] = sense_bank
        return StepBatches(batches, self.counts)


class Buffers:
    """The buffers in host memory that hold whole steps; a buffer is used again when no tensor refers to it any more.

    For every new page the system clears memory, which takes longer than the copy into it.
    """

    def __init__(self, *, pinned: bool) -> None:
        """Prepares buffers; if `pinned`, they are page-locked, and torch reuses them itself."""
        self._pinned = pinned
        self._free: list[np.ndarray] = []
        self._largest = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Returns a tensor [num_bytes] uint8 of any content. Only one thread may call it."""
        if self._pinned:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._largest = max(self._largest, num_bytes)
        buffer = self._free.pop() if self._free else np.empty(0, np.uint8)
        if len(buffer) < num_bytes:
            buffer = np.empty(self._largest, np.uint8)
        # Every tensor in the buffer refers to this view of it, and not to the buffer.
        view = buffer[:num_bytes]
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return torch.from_numpy(view)


def _is_left_out(name: str, value: Any) -> bool:
    return name == _ON_HOST or isinstance(value, RowsInFiles | RowsOfDictionary)


def _states_to_read(rows: Mapping[str, RowsInFiles], places: Mapping[str, _Place]) -> list[StatesToRead]:
    """Returns the states to read of each sample of a micro-batch, given the places of its tensors of states."""
    samples = next(iter(rows.values())).samples if rows else []
    to_read = []
    for number, sample in enumerate(samples):
        columns = {}
        for name, value in rows.items():
            where = places[name]
            row_bytes = (where.stop - where.start) // len(samples)
            columns[value.column] = (where.start + number * row_bytes, where.start + (number + 1) * row_bytes)
        to_read.append(StatesToRead(sample, columns))
    return to_read


def count_positions(micro_batches: Sequence[Mapping[str, Any]]) -> Counts:
    """Counts the positions of micro-batches."""
    targets = senses = relations = lexical = tokens = 0
    for batch in micro_batches:
        mask = loss_positions(batch)
        targets += int(mask.sum())
        tokens += int(batch["loss_mask"].sum())
        sense_tensors = batch.get("senses", {})
        relations += len(sense_tensors.get("relation_positions", ()))
        senses += sum(len(sense_tensors.get(name, ())) for name in ("relation_positions", "own_positions", "positions"))
        if "lexical" in batch:
            lexical += int((batch["lexical"] & mask).sum())
    return Counts(targets, senses, relations, lexical, tokens)


def loss_positions(batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns the positions [B, T] bool of a micro-batch at which CE, KL and hidden-state distance are computed."""
    mask: torch.Tensor = batch.get("drawn_targets", batch["loss_mask"])
    return mask


def copy_ahead(steps: Iterable[PackedStep], copier: "CudaCopier") -> Iterator[PackedStep]:
    """Yields each step after starting the copy of the next one, which proceeds while the step runs."""
    ahead: Any = None
    for step in steps:
        started = copier.start(step)
        if ahead is not None:
            yield copier.finish(ahead)
        ahead = started
    if ahead is not None:
        yield copier.finish(ahead)


class CudaCopier:
    """A copier from pinned memory that uses a separate CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, step: PackedStep) -> tuple[PackedStep, torch.cuda.Event]:
        """Queues the copy without waiting for it; returns the argument of `finish`."""
        with torch.cuda.stream(self._stream):
            buffer = step.buffer.to(self._device, non_blocking=True)
        return replace(step, buffer=buffer), self._stream.record_event()

    def finish(self, started: tuple[PackedStep, torch.cuda.Event]) -> PackedStep:
        """Returns the step on the device.

        Operations queued on the current stream from now on wait for this copy, but not for later ones.
        """
        step, event = started
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        # The buffer belongs to the copy stream, which must not reuse it while the current stream still reads it.
        step.buffer.record_stream(current)
        return step


def _empty_buffer(size: int) -> torch.Tensor:
    """Allocates a buffer of bytes; in a worker it is in shared memory from the start, so sending it copies nothing."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # As in torch's own collation; `share_memory_` would copy the still empty buffer.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size), 0, (size,), (1,))
