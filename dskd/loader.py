"""The loader of training: shards to the micro-batches of each optimizer step, ready on the device ahead of the step.

A worker process reads the samples of a rank's whole step, collates them (:class:`dskd.shards.Collator`) and sends them
as one buffer: one segment of shared memory, one pinned block and one copy to the device for a step, whatever its number
of micro-batches and tensors. While a step runs, the next one is copied on a CUDA stream of its own.
"""

import functools
import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dskd import shards, stopping
from dskd.config import Config
from dskd.distributed import World
from dskd.errors import OutageError, UserError
from dskd.random_numbers import derived_seed
from dskd.schedule import Schedule

if TYPE_CHECKING:
    from dskd.shards.dataset import ShardDataset

Collate = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]

_ALIGNMENT = 16  # bytes; a multiple of every type's size
_ON_HOST = "sample_ids"  # for messages only
_PREFETCHED_STEPS = 2  # by each worker


class Counts(NamedTuple):
    """Positions of a step."""

    targets: int
    senses: int  # with a sense term
    relations: int  # of them, with the relation term; those of the distribution form have none
    lexical: int  # targets with a synonym or antonym, where the batches say which they are


@dataclass(frozen=True)
class Step:
    """What one rank runs in one optimizer step."""

    micro_batches: list[dict[str, Any]]  # of :class:`dskd.shards.Collator`; on the device, but for `sample_ids`
    counts: Counts  # this rank's


def load_steps(
    config: Config,
    schedule: Schedule,
    collate: Collate,
    cache: Path,
    world: World,
    *,
    start_step: int,
    sense_bank: torch.Tensor | None = None,
) -> Generator[Step, None, None]:
    """Yields this rank's part of each step from `start_step` to the last.

    An epoch is a shuffle of the shards by (seed, epoch), cut into whole global batches; where in it a step begins
    follows from the step's number. Only `num_canonical_nodes: 1` gives every number of nodes the same global batches.

    Args:
        config: the experiment.
        schedule: steps and batches.
        collate: a rank's samples of a step to its micro-batches; runs in the workers.
        cache: the node's folder for unpacked shards.
        world: the ranks.
        start_step: the first step, from 0.
        sense_bank: [R, D], all sense embeddings on the device, where batches bring none
            (:func:`dskd.senses.bank.load_bank`).
    """
    dataset = shards.open_shards(
        config,
        "train",
        cache,
        world,
        shuffle=True,
        shuffle_seed=derived_seed(config.seed, "train", "order") % 2**31,
        batch_size=schedule.samples_per_rank,
        epoch_size=schedule.steps_per_epoch * schedule.global_batch_size,
        num_canonical_nodes=1,
    )
    epoch, steps_done = divmod(start_step, schedule.steps_per_epoch)
    dataset.load_state_dict(
        {
            "epoch": epoch,
            "sample_in_epoch": steps_done * schedule.global_batch_size,
            "num_canonical_nodes": 1,
            "shuffle_seed": dataset.shuffle_seed,
            "initial_physical_nodes": 1,
        }
    )
    on_cuda = world.device.type == "cuda"
    workers = config.train.num_workers
    loader = DataLoader(
        StepSamples(dataset, schedule, start_step, place=shards.place(config, "train")),
        batch_size=None,
        num_workers=workers,
        collate_fn=functools.partial(_collate_packed, collate),
        pin_memory=on_cuda,
        prefetch_factor=_PREFETCHED_STEPS if workers else None,
        worker_init_fn=_end_with_rank,
        # A worker waits for ever for a shard that another rank's worker was to fetch and could not.
        timeout=config.train.collective_timeout_s if workers else 0,
    )
    packed = itertools.islice(_steps_in(loader), schedule.total_steps - start_step)
    for step in copy_ahead(packed, CudaCopier(world.device)) if on_cuda else packed:
        yield step.unpack(sense_bank)


@dataclass(frozen=True)
class Unreadable:
    """Why a worker has no more samples: an exception of its own would come out of it as a traceback in a message."""

    message: str
    may_mend_itself: bool


class StepSamples(IterableDataset):
    """Yields a rank's samples of a step, epoch after epoch: its workers live as long as the run, with no gap between.

    The loader takes turns with its workers, and the first step of each epoch is worker 0's: where the workers have not
    equally many steps of an epoch, the others yield an empty one.
    """

    def __init__(self, dataset: "ShardDataset", schedule: Schedule, start_step: int, *, place: str) -> None:
        self._dataset = dataset
        self._place = place
        self._schedule = schedule
        self._start_step = start_step

    def __iter__(self) -> Iterator["list[dict[str, Any]] | Unreadable"]:
        """Yields the samples of this worker's steps; an :class:`Unreadable` is the last that it yields."""
        try:
            yield from self._steps()
        except Exception as error:  # of the file system, the object store, the decoder, each of their own kind
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            yield Unreadable(
                f"{self._place}: a shard of the training data cannot be read ({reason}); put it there as it was made, "
                "or see to the access, and continue with --resume",
                may_mend_itself=not shards.is_lasting(error),
            )

    def _steps(self) -> Iterator[list[dict[str, Any]]]:
        worker = get_worker_info()
        own, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step, schedule = self._start_step, self._schedule
        # Not past the last step: a worker would wait for those of other ranks at the gate of an epoch nobody trains on.
        while step < schedule.total_steps:
            epoch, steps_done = divmod(step, schedule.steps_per_epoch)
            left = min(schedule.steps_per_epoch - steps_done, schedule.total_steps - step)
            self._dataset.current_epoch = epoch
            samples = iter(self._dataset)
            for turn in range(-(-left // num_workers)):
                wanted = schedule.samples_per_rank if turn * num_workers + own < left else 0
                self._dataset.current_step = step + turn * num_workers + own
                # Asked for also where there are none: workers wait for each other when an epoch begins.
                of_step = list(itertools.islice(samples, schedule.samples_per_rank))
                if len(of_step) < wanted:
                    raise self._dataset.failure or EOFError(f"{len(of_step)} samples of a step where it has {wanted}")
                yield of_step
            step += left
            if step < schedule.total_steps:
                next(samples, None)  # the epoch is over when its iterator says so


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


def _collate_packed(collate: Collate, samples: list[dict[str, Any]] | Unreadable) -> PackedStep | Unreadable | None:
    if isinstance(samples, Unreadable):
        return samples
    return PackedStep.of(collate(samples)) if samples else None


def _steps_in(loader: Iterable[PackedStep | Unreadable | None]) -> Iterator[PackedStep]:
    for step in loader:
        if isinstance(step, Unreadable):
            raise (OutageError if step.may_mend_itself else UserError)(step.message)
        if step is not None:
            yield step


def _end_with_rank(worker_id: int) -> None:
    """Ends a worker when its rank has ended, and not before: not by a signal to the whole job, after which the rank
    still finishes a step; and wherever it waits when the rank is killed, for mosaicml-streaming's barriers wait for
    ever.
    """
    stopping.ignore()
    rank = multiprocessing.parent_process()
    assert rank is not None

    def watch() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
