"""All samples of a step in one buffer, and its copy to the device."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import get_worker_info

_ALIGNMENT = 16  # bytes; a multiple of every type's size
_ON_HOST = "sample_ids"  # for messages only


class Counts(NamedTuple):
    """Positions of a step."""

    targets: int
    senses: int  # with a sense term
    relations: int  # of them, with the relation term; those of the distribution form have none
    lexical: int  # targets with a synonym or antonym, where the batches say which they are


@dataclass(frozen=True)
class Step:
    """What one rank runs in one optimizer step."""

    micro_batches: list[
        dict[str, Any]
    ]  # of :class:`dskd.training.collator.Collator`; on the device, but for `sample_ids`
    counts: Counts  # this rank's


class _Place(NamedTuple):
    """Where a tensor lies in a buffer of bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in that buffer."""
        return buffer[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class PackedStep:
    """A :class:`Step` whose tensors lie in one buffer."""

    buffer: torch.Tensor  # [bytes] uint8
    layout: list[dict[str, Any]]  # the micro-batches, with places for tensors
    sample_ids: list[list[int]]  # of each micro-batch
    counts: Counts

    @classmethod
    def of(cls, micro_batches: list[dict[str, Any]]) -> "PackedStep":
        """Packs micro-batches; in a loader's worker, into shared memory."""
        pieces: list[tuple[_Place, torch.Tensor]] = []
        size = 0

        def place(value: Any) -> Any:
            nonlocal size
            if isinstance(value, dict):
                return {name: place(part) for name, part in value.items() if name != _ON_HOST}
            where = _Place(-(-size // _ALIGNMENT) * _ALIGNMENT, value.dtype, tuple(value.shape))
            size = where.stop
            pieces.append((where, value))
            return where

        layout = [place(batch) for batch in micro_batches]
        buffer = _empty_buffer(size)
        for where, value in pieces:
            where.view_of(buffer).copy_(value)
        return cls(
            buffer, layout, [batch[_ON_HOST].tolist() for batch in micro_batches], count_positions(micro_batches)
        )

    def unpack(self, sense_bank: torch.Tensor | None = None) -> Step:
        """The micro-batches as views of the buffer, with `sense_bank` as their sense rows where it is given."""

        def view(place: Any) -> Any:
            if isinstance(place, dict):
                return {name: view(part) for name, part in place.items()}
            return place.view_of(self.buffer)

        batches = [
            view(layout) | {_ON_HOST: torch.tensor(ids)}
            for layout, ids in zip(self.layout, self.sample_ids, strict=True)
        ]
        if sense_bank is not None:
            for batch in batches:
                batch["senses"]["sense_rows"] = sense_bank
        return Step(batches, self.counts)

    def pin_memory(self) -> "PackedStep":
        """The same in page-locked memory; the loader's thread calls it."""
        return replace(self, buffer=self.buffer.pin_memory())


def count_positions(micro_batches: Sequence[Mapping[str, Any]]) -> Counts:
    """The positions of micro-batches."""
    targets = senses = relations = lexical = 0
    for batch in micro_batches:
        targets += int(batch["loss_mask"].sum())
        of_senses = batch.get("senses", {})
        relations += len(of_senses.get("relation_positions", ()))
        senses += sum(len(of_senses.get(name, ())) for name in ("relation_positions", "own_positions", "positions"))
        if "lexical" in batch:
            lexical += int((batch["lexical"] & batch["loss_mask"]).sum())
    return Counts(targets, senses, relations, lexical)


class Copier(Protocol):
    """Copies steps to a device in two halves."""

    def start(self, step: PackedStep) -> Any:
        """Begins a copy and returns what `finish` takes."""

    def finish(self, started: Any) -> PackedStep:
        """The step on the device, for use in whatever is queued there from now on."""


def copy_ahead(steps: Iterable[PackedStep], copier: Copier) -> Iterator[PackedStep]:
    """Yields each step when the copy of the one after it has been started: it is under way while the step runs."""
    ahead: Any = None
    for step in steps:
        started = copier.start(step)
        if ahead is not None:
            yield copier.finish(ahead)
        ahead = started
    if ahead is not None:
        yield copier.finish(ahead)


class CudaCopier:
    """Copies from pinned memory on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, step: PackedStep) -> tuple[PackedStep, torch.cuda.Event]:
        """Queues the copy; nobody waits for it."""
        with torch.cuda.stream(self._stream):
            buffer = step.buffer.to(self._device, non_blocking=True)
        return replace(step, buffer=buffer), self._stream.record_event()

    def finish(self, started: tuple[PackedStep, torch.cuda.Event]) -> PackedStep:
        """Makes what is queued on the current stream from now on wait for this copy, and not for a later one."""
        step, event = started
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        # The buffer belongs to the side stream: it must not be used again there while the current one still reads it.
        step.buffer.record_stream(current)
        return step


def _empty_buffer(size: int) -> torch.Tensor:
    """Bytes to be sent: in a worker they are in shared memory from the start, and nothing is copied when they are."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # As torch's own collating does it; `share_memory_` would copy what is not there yet.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size), 0, (size,), (1,))
