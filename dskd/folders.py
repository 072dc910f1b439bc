"""Making folders, and putting a whole one in the place of another."""

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
