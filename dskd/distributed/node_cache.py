"""The node cache: a private folder of one job on each node, for unpacked shards and mosaicml-streaming's lock files.

Two jobs on one node must not share it: mosaicml-streaming refuses a cache that another job uses, and lock files that
a killed job left in /tmp would block every later one. The folder is removed when the job ends. The folder of a killed
job is removed by the next job, which finds that nobody holds its lock.
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

from dskd.distributed import shared_memory
from dskd.distributed.collectives import barrier, gather_json
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError

_LOCK_NAME = "owner.lock"
_PATIENCE_S = 60


def open_node_cache(base: str | None, world: World) -> Path:
    """Creates the folder on every node and returns it; all ranks of a node get the same. Every rank must call it.

    Args:
        base: the node-local parent folder; None for a private folder in the system's temporary folder.
        world: the ranks.

    Raises:
        UserError: if the parent folder is not writable or belongs to another user, on all nodes.
        OutageError: if that is so on some nodes only: other nodes may do.
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
    """Makes mosaicml-streaming choose names of shared memory that are not in use.

    Every rank opens its dataset inside this block.

    For each kind of segment, mosaicml-streaming finds the first number that is free, and then uses the highest of these
    numbers. If a killed job, or one that is just ending, has left some kinds of segments but not others, that number
    can be in use: the start then fails, or silently continues with the old content. mosaicml-streaming skips numbers
    that have a lock file in the folder for temporary files, so this function creates a lock file for every number in
    use, in a folder of this job alone.

    The jobs of a node choose one after another. All jobs wait for their nodes in the same order, so no two jobs can
    each hold a node that the other waits for.

    Raises:
        UserError: if the shared memory of a node is full.
    """
    from streaming.base.constant import BARRIER_FILELOCK  # the library takes seconds to import

    _require_shared_memory(world)
    before = tempfile.tempdir
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for leader in _leaders_by_host(world):
            if world.rank == leader and shared_memory.FOLDER.is_dir():
                stack.enter_context(_one_job_at_a_time())
                for segment in shared_memory.FOLDER.iterdir():
                    if match := re.match(r"\d{6}_", segment.name):
                        (folder / f"{match.group()}{BARRIER_FILELOCK}").touch()
            barrier()
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def _require_shared_memory(world: World) -> None:
    shortages = gather_json(shared_memory.describe_shortage() if world.local_rank == 0 else None)
    if problems := sorted({shortage for shortage in shortages if shortage}):
        raise UserError("\n".join(problems), known_to_all_ranks=True)


def _leaders_by_host(world: World) -> list[int]:
    """Returns the first rank of each node, in the order of the nodes' names. Every rank must call it."""
    nodes = gather_json({"host": socket.gethostname(), "is_leader": world.local_rank == 0})
    return sorted(
        (rank for rank, node in enumerate(nodes) if node["is_leader"]), key=lambda rank: (nodes[rank]["host"], rank)
    )


@contextlib.contextmanager
def _one_job_at_a_time() -> Iterator[None]:
    folder = os.open(shared_memory.FOLDER, os.O_RDONLY)
    try:
        # After a while, proceed without the lock: a hanging job must not block the others, and a clash is unlikely.
        deadline = time.monotonic() + _PATIENCE_S
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
    """Creates a folder that belongs to this process until it ends; first removes folders of killed processes.

    Raises:
        OSError: if `parent` is not writable.
    """
    _remove_abandoned(parent)
    unlocked = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    lock = (unlocked / _LOCK_NAME).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Rename it only now that it is locked: under this name others would otherwise consider it abandoned.
    folder = unlocked.rename(parent / unlocked.name.replace(".new-", "job-"))
    atexit.register(_release, folder, lock)  # the argument also keeps the file open, and with it the lock
    return folder


def _create(base: str | None) -> Path:
    parent = Path(base) if base is not None else Path(tempfile.gettempdir()) / f"dskd-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, parents=base is not None, exist_ok=True)
        if parent.is_symlink() or parent.stat().st_uid != os.getuid():
            raise UserError(f"{parent}: belongs to another user; set train.shard_cache to a folder of your own")
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
        except OSError:  # its job is alive, or is removing it at this moment
            continue
        shutil.rmtree(folder, ignore_errors=True)
