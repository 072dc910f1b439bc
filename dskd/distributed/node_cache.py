"""A folder on each node that one job has to itself: unpacked shards, and the lock files of mosaicml-streaming.

Two jobs on one node must not share it: mosaicml-streaming refuses a cache that another job uses, and lock files that
a killed job left in /tmp would be in the way of every later one. The folder goes when the job ends; what a killed job
left is removed by the next one, which sees that nobody holds its lock.
"""

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dskd.distributed.collectives import barrier, gather_json
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError

_LOCK_NAME = "owner.lock"
_SHARED_MEMORY = Path("/dev/shm")
_PATIENCE_S = 60
_LEAST_SHARED_MEMORY = 4 * 2**20  # bytes; the smallest runs of the tests take one of them


def open_node_cache(base: str | None, world: World) -> Path:
    """Makes the folder on every node and returns it; all ranks of a node get the same. Every rank must call it.

    Args:
        base: where, as a node-local folder; None is a private folder below the system's temporary one.
        world: the ranks.

    Raises:
        UserError: when the place cannot be written to, or belongs to another user; an OutageError where that is some of
            the nodes, and others may do.
    """
    folder, problem = None, None
    if world.local_rank == 0:
        try:
            folder = str(_create(base))
        except UserError as error:
            problem = f"{socket.gethostname()}: {error}"
    replies = gather_json({"folder": folder, "problem": problem})
    if problems := [reply["problem"] for reply in replies if reply["problem"]]:
        error_type = OutageError if any(reply["folder"] for reply in replies) else UserError
        raise error_type("\n".join(problems), known_to_all_ranks=True)
    return Path(replies[world.rank - world.local_rank]["folder"])


@contextlib.contextmanager
def streaming_names(folder: Path, world: World) -> Iterator[None]:
    """Makes mosaicml-streaming take names of shared memory that nobody has. Every rank opens its dataset in here.

    By itself it takes, for each kind of segment, the first number without one, and of these the highest: where a killed
    job, or one that goes just now, left some kinds and not others, that number is in use, and the start fails, or
    silently goes on with the old content. A number with a lock file in the folder of temporary files it passes over, so
    every number in use gets one, in a folder that is this job's own. Jobs of a node choose one after the other, and all
    jobs wait for their nodes in the same order, so none has a node that another waits for with one that it has.

    Raises:
        UserError: if the shared memory of a node is full.
    """
    from streaming.base.constant import BARRIER_FILELOCK  # the library takes seconds to import

    _require_shared_memory(world)
    before = tempfile.tempdir
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for leader in _leaders_by_host(world):
            if world.rank == leader and _SHARED_MEMORY.is_dir():
                stack.enter_context(_one_job_at_a_time())
                for segment in _SHARED_MEMORY.iterdir():
                    if match := re.match(r"\d{6}_", segment.name):
                        (folder / f"{match.group()}{BARRIER_FILELOCK}").touch()
            barrier()
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def _require_shared_memory(world: World) -> None:
    shortages = gather_json(shared_memory_shortage() if world.local_rank == 0 else None)
    if problems := sorted({shortage for shortage in shortages if shortage}):
        raise UserError("\n".join(problems), known_to_all_ranks=True)


def shared_memory_shortage(*, is_known: bool = False) -> str | None:
    """Returns what to do about this node's shared memory if next to nothing of it is free, otherwise None.

    Whoever writes more to it than there is gets a bus error, which ends the process without a word, or the error of a
    full disk.

    Args:
        is_known: it was full a moment ago, and whoever filled it may have died of that.
    """
    if not _SHARED_MEMORY.is_dir():
        return None
    usage = shutil.disk_usage(_SHARED_MEMORY)
    if usage.free >= _LEAST_SHARED_MEMORY and not is_known:
        return None
    return (
        f"{socket.gethostname()}: {_SHARED_MEMORY}, where the loader keeps batches, is full or too small: "
        f"{usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB are free. Remove what killed jobs left there "
        f"(`ls -l {_SHARED_MEMORY}`), give the container more (docker: --shm-size=8g; Kubernetes: an emptyDir of "
        "medium Memory), or lower train.num_workers"
    )


def _leaders_by_host(world: World) -> list[int]:
    """The first rank of each node, in the order of the nodes' names. Every rank must call it."""
    nodes = gather_json({"host": socket.gethostname(), "is_leader": world.local_rank == 0})
    return sorted(
        (rank for rank, node in enumerate(nodes) if node["is_leader"]), key=lambda rank: (nodes[rank]["host"], rank)
    )


@contextlib.contextmanager
def _one_job_at_a_time() -> Iterator[None]:
    folder = os.open(_SHARED_MEMORY, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE_S  # a job that hangs must not stop the others; a clash is unlikely
        while time.monotonic() < deadline:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        os.close(folder)


def make_own_folder(parent: Path) -> Path:
    """A folder that is this process's until it ends; what killed processes left there is removed first.

    Raises:
        OSError: when `parent` cannot be written to.
    """
    _remove_abandoned(parent)
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    lock = (made / _LOCK_NAME).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Only now does it get a name by which others would find it abandoned.
    folder = made.rename(parent / made.name.replace(".new-", "job-"))
    atexit.register(_release, folder, lock)  # the argument also keeps the file open, and with it the lock
    return folder


def _create(base: str | None) -> Path:
    parent = Path(base) if base is not None else Path(tempfile.gettempdir()) / f"dskd-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, parents=base is not None, exist_ok=True)
        if parent.is_symlink() or parent.stat().st_uid != os.getuid():
            raise UserError(f"{parent}: belongs to somebody else; set train.shard_cache to a folder of your own")
        return make_own_folder(parent)
    except OSError as error:
        raise UserError(
            f"{parent}: cannot write there ({error.strerror}); set train.shard_cache to a folder of your own"
        ) from None


def _release(folder: Path, lock: object) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob("job-*"):
        try:
            with (folder / _LOCK_NAME).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its job lives, or has just made the folder, or removes it at this moment
            continue
        shutil.rmtree(folder, ignore_errors=True)
