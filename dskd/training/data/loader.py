"""The data loader of training: turns shards into each optimizer step's micro-batches, on the device ahead of time.

A worker process reads all samples of a rank's step, collates them (:class:`dskd.training.data.collator.Collator`) and
sends them as one buffer. A step thus needs one segment of shared memory, one pinned block and one copy to the device,
regardless of its number of micro-batches and tensors. While a step runs, the next is copied on a separate CUDA stream.

Stored states and sense rows do not pass through a worker: a thread of the rank copies them from their files into the
block. A worker has read them before, which brings them into the page cache; it compared the samples with their hashes.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.disk_space import DISK_IS_FULL
from dskd.artifacts.mds import INDEX
from dskd.config import Config
from dskd.console import gigabytes
from dskd.distributed import stopping
from dskd.distributed.torch_errors import is_death_of_worker
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError, reason_of
from dskd.random_numbers import derived_seed
from dskd.shards.sample_files import find_changed_size
from dskd.training.data.packed_step import Buffers, CudaCopier, FileReader, PackedStep, StepBatches, copy_ahead
from dskd.training.schedule import Schedule

if TYPE_CHECKING:
    from dskd.shards.dataset import ShardDataset

Collate = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]

PREFETCHED_STEPS = 2  # per worker
COMPLETED_STEPS = 3  # buffers with all of a step that a rank holds: of the step that runs, the next, and the one after


def load_steps(
    config: Config,
    schedule: Schedule,
    collate: Collate,
    cache: Path,
    world: World,
    *,
    start_step: int,
    sense_bank: torch.Tensor | None = None,
) -> Generator[StepBatches, None, None]:
    """Yields this rank's part of each step from `start_step` to the last.

    An epoch is a shuffle of the shards by (seed, epoch), cut into whole global batches; the step's number determines
    its place in the epoch. Only `num_canonical_nodes: 1` gives every number of nodes the same global batches.

    Args:
        config: the experiment.
        schedule: steps and batches.
        collate: turns a rank's samples of a step into its micro-batches; runs in the workers.
        cache: the node's folder for unpacked shards.
        world: the ranks.
        start_step: the first step to yield, counted from 0.
        sense_bank: [R, D], all sense embeddings on the device (:func:`dskd.training.data.sense_bank.load_bank`); None
            if batches bring their own rows.
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
        StepSamples(config, dataset, schedule, start_step),
        batch_size=None,
        num_workers=workers,
        collate_fn=functools.partial(_collate_packed, collate),
        prefetch_factor=PREFETCHED_STEPS if workers else None,
        worker_init_fn=_end_with_rank,
        # Without a timeout, a worker waits forever for a shard that another rank's worker failed to fetch.
        timeout=config.train.collective_timeout_s if workers else 0,
    )
    packed = itertools.islice(_steps_in(loader, config, dataset.folder), schedule.total_steps - start_step)
    complete = _complete_ahead(packed, config, pinned=on_cuda)
    for step in copy_ahead(complete, CudaCopier(world.device)) if on_cuda else complete:
        yield step.unpack(sense_bank)


@dataclass(frozen=True)
class Unreadable:
    """The reason why a worker has no more samples.

    Passed as a value because an exception raised in a worker arrives as a message that contains a traceback.
    """

    message: str
    is_temporary: bool

    @classmethod
    def of(cls, error: Exception, config: Config) -> "Unreadable":
        """Describes the error that occurred while a shard of the training data was read."""
        folder = config.path(kinds.SHARDS.folder, "train")
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            size = sum(entry["size_bytes"] for entry in shards.load_manifest(config, "train").files.values())
            return cls(
                f"train.shard_cache: the disk is full to which this node copies or unpacks the shards of the training "
                f"data, {gigabytes(size)} or more ({reason_of(error)}); set it to a folder with room for them, or free "
                "space there, and continue with --resume",
                is_temporary=True,
            )
        if config.train.shard_remote is None:
            # Without its removal, annotation would skip it as up to date: it compares sizes, and not contents.
            again = (
                f"If there is no copy of it, remove {folder} and make the shards again with `{kinds.SHARDS.made_by}`"
            )
        elif (folder / INDEX).is_file():
            again = f"{folder} has the same files, and `dskd inspect shards --config FILE` compares their content"
        else:  # only the manifests are here
            again = (
                f"If there is no copy of it, make the shards again with `{kinds.SHARDS.made_by}` and copy them there"
            )
        return cls(
            f"{shards.location_of(config, 'train')}: a shard of the training data cannot be read ({reason_of(error)}); "
            f"restore the file, or your access to it, and continue with --resume. {again}",
            is_temporary=not shards.is_lasting(error),
        )

    def as_error(self) -> Exception:
        """Returns the exception that ends the run."""
        return (OutageError if self.is_temporary else UserError)(self.message)


class StepSamples(IterableDataset):
    """A dataset of a rank's samples per step, over all epochs: workers live as long as the run, without gaps.

    The loader reads from its workers in turn, and the first step of each epoch comes from worker 0. If an epoch's
    steps do not divide evenly among the workers, those with fewer yield an empty step.
    """

    def __init__(self, config: Config, dataset: "ShardDataset", schedule: Schedule, start_step: int) -> None:
        self._config = config
        self._dataset = dataset
        self._schedule = schedule
        self._start_step = start_step

    def __iter__(self) -> Iterator["list[dict[str, Any]] | Unreadable"]:
        """Yields the samples of this worker's steps; after a failure, yields an :class:`Unreadable` and ends."""
        try:
            yield from self._steps()
        except Exception as error:  # file system, object store and decoder each raise their own types
            yield Unreadable.of(error, self._config)

    def _steps(self) -> Iterator[list[dict[str, Any]]]:
        worker = get_worker_info()
        own, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step, schedule = self._start_step, self._schedule
        # Stop at the last step: otherwise workers would wait for each other to begin an epoch that nobody trains on.
        while step < schedule.total_steps:
            epoch, steps_done = divmod(step, schedule.steps_per_epoch)
            left = min(schedule.steps_per_epoch - steps_done, schedule.total_steps - step)
            self._dataset.current_epoch = epoch
            samples = iter(self._dataset)
            for turn in range(-(-left // num_workers)):
                needed = schedule.samples_per_rank if turn * num_workers + own < left else 0
                self._dataset.current_step = step + turn * num_workers + own
                # Read even if this worker has no step left: workers wait for each other when an epoch begins.
                step_samples = list(itertools.islice(samples, schedule.samples_per_rank))
                if len(step_samples) < needed:
                    raise self._dataset.failure or EOFError(f"only {len(step_samples)} of {needed} samples of a step")
                yield step_samples
            step += left
            if step < schedule.total_steps:
                next(samples, None)  # exhausts the iterator, which ends the epoch


def _collate_packed(collate: Collate, samples: list[dict[str, Any]] | Unreadable) -> PackedStep | Unreadable | None:
    if isinstance(samples, Unreadable):
        return samples
    return PackedStep.of(collate(samples)) if samples else None


def _steps_in(loader: Iterable[PackedStep | Unreadable | None], config: Config, folder: Path) -> Iterator[PackedStep]:
    try:
        for step in loader:
            if isinstance(step, Unreadable):
                raise step.as_error()
            if step is not None:
                yield step
    except (RuntimeError, ConnectionError, EOFError) as error:
        is_torchs = isinstance(error, RuntimeError)
        # A file that becomes shorter while a worker copies from its map ends the worker with a bus error.
        if (not is_torchs or is_death_of_worker(error)) and (changed := find_changed_size(folder)):
            raise Unreadable.of(changed, config).as_error() from error
        if not is_torchs:  # it died while the rank took over a step from it, before torch noticed
            raise RuntimeError("a DataLoader worker exited unexpectedly while it handed over a step") from error
        raise


@contextlib.contextmanager
def shorter_shards_named(config: Config) -> Iterator[None]:
    """Names the shard that became shorter when a worker died of it.

    torch notices a dead worker by a signal, so its error can be raised anywhere in the rank, and not only where the
    rank waits for a step.

    Raises:
        UserError: in the place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        folder = config.path(kinds.SHARDS.folder, "train")
        if is_death_of_worker(error) and (changed := find_changed_size(folder)):
            raise Unreadable.of(changed, config).as_error() from error
        raise


def _complete_ahead(steps: Iterator[PackedStep], config: Config, *, pinned: bool) -> Iterator[PackedStep]:
    """Yields each step with its states and sense rows; while it runs, a thread reads those of the next.

    On a GPU (`pinned`), it also copies steps without them to page-locked memory.
    """
    reader, buffers = FileReader(), Buffers(pinned=pinned)

    def complete(step: PackedStep) -> PackedStep:
        try:
            return step.complete(reader, buffers) if step.to_read or pinned else step
        except (OSError, ValueError) as error:
            raise Unreadable.of(error, config).as_error() from None

    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead: deque[Future[PackedStep]] = deque()
        for step in steps:
            ahead.append(thread.submit(complete, step))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _end_with_rank(worker_id: int) -> None:
    """Makes a worker end when its rank ends, and not before.

    A signal to the whole job must not end it, because the rank still finishes a step. When the rank is killed, the
    worker must end whatever it waits for: mosaicml-streaming's barriers wait forever.
    """
    stopping.ignore()
    rank = multiprocessing.parent_process()
    assert rank is not None

    def watch() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
