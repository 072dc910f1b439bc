"""Folders and files that are never incomplete: each is written under a hidden name and then renamed."""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from dskd.artifacts.disk_space import DISK_IS_FULL
from dskd.errors import UserError

DPI = 150


def real_place(path: Path) -> Path:
    """Returns where `path` points if it is a symbolic link (such as to a larger disk), otherwise `path`."""
    return path.resolve() if path.is_symlink() else path


def old_folder(folder: Path) -> Path:
    """Returns the name that a folder has temporarily while a new one replaces it."""
    folder = real_place(folder)
    return folder.with_name(f".{folder.name}.old")


def replace_folder(new: Path, folder: Path) -> None:
    """Moves `new` to `folder`, replacing what is there. A crash leaves the old folder, the new one or none, but no mix.

    If `folder` is a symbolic link, the link stays and the folder that it points to is replaced.
    """
    old = old_folder(folder)
    remove_tree(old)
    folder = real_place(folder)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    remove_tree(old)


def require_replaceable(folder: Path) -> None:
    """Checks that :func:`replace_folder` can replace `folder`, before a stage works for hours on its content.

    Raises:
        UserError: if it is a file, a mount point, or a link to a disk that is not mounted.
    """
    real = real_place(folder)
    where = f"{folder}: this is a link to {real}, which" if folder.is_symlink() else f"{folder}: this"
    if folder.is_symlink() and not real.parent.is_dir():
        raise UserError(
            f"{where} is not there, nor is {real.parent}; mount that disk, make the folder, or remove the link"
        )
    if real.exists() and not real.is_dir():
        raise UserError(f"{where} is not a folder; remove it, or set workdir to another folder")
    if os.path.ismount(real):
        raise UserError(
            f"{where} is a mount point, so it cannot be replaced by a new artifact; make {folder} a link to a folder "
            "inside of that file system"
        )


def remove_tree(path: Path) -> None:
    """Removes a folder with its content, a file, or a symbolic link (not its target); ignores errors."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(path: Path, *, remedy: str = "set workdir to a folder you may write") -> None:
    """Creates a folder and its parents, and checks that it is writable.

    Raises:
        UserError: if that is not possible, with `remedy` as what to do.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # a unique name, so that processes do not collide
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path}: this is a link to {path.resolve()}, which is not there; make that folder, or remove the link"
            ) from None
        reason = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            file = next((each for each in (path, *path.parents) if each.is_file()), None)
            reason = f"{file} is a file, not a folder" if file else reason
        raise UserError(f"{path}: cannot write there ({reason}); {remedy}") from None


def share_files(folder: Path) -> None:
    """Lets others read, and write, the files of a folder as far as the umask allows, as for a file that `open` creates.

    safetensors 0.8 writes files that only their owner can read, whatever the umask says.
    """
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | (0o666 & ~mask))


def flush_folder(folder: Path) -> None:
    """Flushes all files of a folder, and the folder itself, to the disk."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the complete new one, whatever happens meanwhile."""
    with replaced_file(path) as new, new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces `path` when the block ends without an error.

    If several processes do so at the same time, the last one's file stays. If `path` is a symbolic link, the link stays
    and the file that it points to is replaced.
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
        UserError: if `path` is not writable; a full disk remains an OSError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as new:
            figure.savefig(new, dpi=DPI, format="png")  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise
        raise UserError(
            f"{path}: the picture cannot be written there ({error.strerror}); set workdir to a folder you may write "
            "(`dskd inspect plot`: or name a file with --output), or leave the picture out"
        ) from None
