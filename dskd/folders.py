"""Making folders and files that are never half there."""

import os
import shutil
from pathlib import Path

from dskd.errors import UserError


def replace_folder(new: Path, place: Path) -> None:
    """Moves `new` to `place`. A crash in between leaves the old folder, the new one or none, never a mixture."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents.

    Raises:
        UserError: when that is not allowed, with what to change.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot write there ({error.strerror}); set workdir to a folder you may write"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the whole new one, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
