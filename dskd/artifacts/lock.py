"""Lock files, each held by at most one live process, so that no two processes write the same artifacts."""

import atexit
import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dskd.artifacts.files import make_folder
from dskd.console import say
from dskd.errors import OutageError, UserError

_held: dict[Path, Any] = {}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def hold_lock(path: Path, what: str, *, wait_s: float = 0.0) -> None:
    """Acquires the lock at `path` until it is released or the process ends, however it ends.

    Acquiring a lock that this process already holds is a no-op.

    Args:
        path: the lock file. It is removed with the lock; after a kill it stays, but nobody holds the lock any more.
        what: what the holder does, for the message.
        wait_s: how long to wait for another process that may be ending, or for a file server that has not yet noticed
            that a node is dead.

    Raises:
        UserError: if another process holds the lock and `wait_s` is 0, or if the file system has no locks.
        OutageError: if another process still holds the lock after `wait_s`.
    """
    if path in _held:
        return
    make_folder(path.parent)
    deadline = time.monotonic() + wait_s
    is_waiting = False
    while True:
        try:
            stream = path.open("a+")
        except PermissionError as refused:
            raise UserError(
                f"{path}: {refused.strerror}; it belongs to user {path.stat().st_uid}, whose process holds it or "
                "was killed. If none of that user's processes works here, remove this file"
            ) from None
        try:
            # Not flock: a forked loader worker would inherit it and hold it for seconds after its rank has died.
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            stream.close()
            if time.monotonic() < deadline:
                if not is_waiting:
                    say(f"{path}: another process ({holder}) {what}; waiting for it for up to {wait_s:.0f} s")
                    is_waiting = True
                time.sleep(0.5)
                continue
            error = OutageError if wait_s else UserError
            raise error(
                f"{path}: another process ({holder}) {what}; wait for it or end it. After a kill of the pipeline or "
                "the launcher its ranks may still run"
            ) from None
        except OSError as error:
            stream.close()
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"{path}: this file system has no locks ({error.strerror}), and without them two processes may "
                "write the same files; mount it with locks (Lustre: -o flock; NFS: version 4, or lockd on clients and "
                "server), or set workdir to another file system"
            ) from None
        if _is_file(path, stream):
            break
        stream.close()  # the previous holder removed this file just after it was opened here, so try again
    stream.truncate(0)
    stream.write(f"pid {os.getpid()} on {os.uname().nodename}")
    stream.flush()
    _held[path] = stream
    atexit.register(release_lock, path)


@contextlib.contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Holds the lock at `path` during the block if no other process holds it; yields True if it does."""
    had = path in _held
    try:
        hold_lock(path, "")
    except UserError:
        yield False
        return
    try:
        yield True
    finally:
        if not had:
            release_lock(path)


def _is_file(path: Path, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def release_lock(path: Path) -> None:
    """Releases the lock and removes its file; a no-op if this process does not hold it."""
    stream = _held.pop(path, None)
    if stream is not None:
        path.unlink(missing_ok=True)
        stream.close()
