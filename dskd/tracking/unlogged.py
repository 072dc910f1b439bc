"""Notes that MLflow does not have the results of an artifact yet.

An artifact is published before its results are logged to MLflow. A process that is killed in between leaves the note,
and the next one logs the results instead of taking them as done.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskd.artifacts.files import write_text


def note_unlogged(artifact: Path, message: Mapping[str, Any]) -> None:
    """Notes what is to be logged, plain JSON-like data, next to an artifact that is about to be published."""
    write_text(_note(artifact), json.dumps(message))


def read_unlogged(artifact: Path) -> dict[str, Any] | None:
    """Returns what :func:`note_unlogged` has noted, None if everything is logged."""
    try:
        noted: dict[str, Any] = json.loads(_note(artifact).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return noted


def forget_unlogged(artifact: Path) -> None:
    """Removes the note: everything is logged, or there is nothing to log."""
    _note(artifact).unlink(missing_ok=True)


def _note(artifact: Path) -> Path:
    return artifact.with_name(f".{artifact.name}.unlogged.json")
