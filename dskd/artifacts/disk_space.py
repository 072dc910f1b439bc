"""Disk space: checked before something large is written, and reported if it runs out while it is written."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dskd.console import gigabytes
from dskd.errors import UserError

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)  # EDQUOT: a quota is exhausted
_FULL_BYTES = 2**20  # a disk counts as full if it cannot take this many more bytes


def require_disk_space(
    path: Path, needed: int, purpose: str, *, remedy: str = "set workdir to another disk", already_written: int = 0
) -> None:
    """Checks that a disk has room for something before it is written.

    Args:
        path: the folder to write, which need not exist yet.
        needed: the bytes that it will take.
        purpose: what they are for, for the message: "a checkpoint".
        remedy: what to do other than freeing space.
        already_written: the bytes of it that an interrupted run has written.

    Raises:
        UserError: if less is free; it names the folder and both sizes.
    """
    free = shutil.disk_usage(nearest_existing(path)).free + already_written
    if free < needed:
        raise UserError(
            f"{path}: not enough disk space for {purpose}: {gigabytes(needed)} are needed, but only "
            f"{gigabytes(free)} are free. Free some space, or {remedy}"
        )


def nearest_existing(path: Path) -> Path:
    """Returns `path`, or its nearest parent that exists."""
    return next(path for path in (path, *path.absolute().parents) if path.exists())


@contextlib.contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turns write errors of torch and safetensors into an OSError if the cause is a full disk or quota.

    An OSError that has this cause, and names no file, gets `folder` as its file name.
    """
    try:
        yield
    except OSError as error:
        # Shared memory can be full too, so test that it is this disk.
        if error.errno in DISK_IS_FULL and not error.filename and _full_disk(folder):
            error.filename = str(folder)
        raise
    except (RuntimeError, SafetensorError) as error:
        number = _full_by(error, folder)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _full_by(error: Exception, folder: Path) -> int | None:
    """Returns the error number of a full disk or quota if that is the cause of `error`, otherwise None."""
    # safetensors names the number, and has removed its incomplete file, so the disk may have space again. torch does
    # neither, so there the disk is tested.
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return int(number[1]) if int(number[1]) in DISK_IS_FULL else None
    return _full_disk(folder)


def _full_disk(folder: Path) -> int | None:
    """Returns the error number of a full disk or quota if the disk of `folder` is full, otherwise None."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, _FULL_BYTES)
            os.fsync(probe.fileno())  # a network file system may not report it before this
    except OSError as error:
        return error.errno if error.errno in DISK_IS_FULL else None
    return None
