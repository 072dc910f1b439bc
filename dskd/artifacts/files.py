"""Making folders and files that are never half there."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dskd.errors import UserError

_DPI = 150

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)  # EDQUOT: a quota is
_FULL_BYTES = 2**20  # at most what is left when the next block did not fit


def real_place(path: Path) -> Path:
    """Returns where a file or folder really is: elsewhere if `path` is a symbolic link, as to a larger disk."""
    return path.resolve() if path.is_symlink() else path


def old_folder(place: Path) -> Path:
    """Returns the name that a folder has while another one takes its place."""
    place = real_place(place)
    return place.with_name(f".{place.name}.old")


def replace_folder(new: Path, place: Path) -> None:
    """Moves `new` to `place`. A crash in between leaves the old folder, the new one or none, never a mixture.

    If `place` is a symbolic link it stays, and what it points to is replaced.
    """
    old = old_folder(place)
    remove_tree(old)
    place = real_place(place)
    if place.exists():
        place.rename(old)
    new.rename(place)
    remove_tree(old)


def require_replaceable(place: Path) -> None:
    """Refuses a place that :func:`replace_folder` could not replace, before anyone works for hours on what goes there.

    Raises:
        UserError: when it is a file, a mount point, or a link to a disk that is not there.
    """
    real = real_place(place)
    where = f"{place}: this is a link to {real}, which" if place.is_symlink() else f"{place}: this"
    if place.is_symlink() and not real.parent.is_dir():
        raise UserError(
            f"{where} is not there, nor is {real.parent}; mount that disk, make the folder, or remove the link"
        )
    if real.exists() and not real.is_dir():
        raise UserError(f"{where} is not a folder; remove it, or set workdir to another folder")
    if os.path.ismount(real):
        raise UserError(
            f"{where} is a mount point, so it cannot be replaced by a new artifact; make {place} a link to a folder "
            "inside of that file system"
        )


def remove_tree(path: Path) -> None:
    """Removes a folder with all that is in it, or a file, as far as that works; of a symbolic link only the link."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents.

    Raises:
        UserError: when that is not allowed, with what to change.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # each process tries with a name of its own
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path}: this is a link to {path.resolve()}, which is not there; make that folder, or remove the link"
            ) from None
        raise UserError(
            f"{path}: cannot write there ({error.strerror}); set workdir to a folder you may write"
        ) from None


def flush_folder(folder: Path) -> None:
    """Makes sure that what lies in a folder is on the disk, and not only on its way there."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def full_disk_is_said(folder: Path) -> Iterator[None]:
    """Turns what torch and safetensors raise when they cannot write into an error of the operating system, where the
    disk or a quota is full.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        number = _full_by(error, folder)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _full_by(error: Exception, folder: Path) -> int | None:
    """The number of the system's error behind another one, where that says that the folder's disk or quota is full."""
    # safetensors says the number, and has removed what it wrote. torch does neither, so there it is tried.
    if said := re.search(r"\(os error (\d+)\)", str(error)):
        return int(said[1]) if int(said[1]) in DISK_IS_FULL else None
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, _FULL_BYTES)
            os.fsync(probe.fileno())  # a network file system may know no sooner
    except OSError as found:
        return found.errno if found.errno in DISK_IS_FULL else None
    return None


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the whole new one, whatever happens meanwhile."""
    with replaced_file(path) as new, new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block has come to its end. Of several processes
    that do so at once the last one's stays. If `path` is a symbolic link it stays, and what it points to is replaced.
    """
    path = real_place(path)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def save_figure(figure: object, path: Path) -> None:
    """Writes a figure as PNG.

    Raises:
        UserError: if the place cannot be written to; a full disk remains an OSError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as new:
            figure.savefig(new, dpi=_DPI, format="png")  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise
        raise UserError(
            f"{path}: the picture cannot be written there ({error.strerror}); set workdir to a folder you may write "
            "(`dskd inspect plot`: or name a file with --output), or leave the picture out"
        ) from None
