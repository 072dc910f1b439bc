"""Opening the artifacts that the inspections read; for a missing one, the report gets a line on how to make it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder, find_teacher

T = TypeVar("T")


@dataclass(frozen=True)
class Teacher:
    """The parts of the teacher that inspections need: its folder, its tokenizer, and its model's number of tokens."""

    folder: ModelFolder
    tokenizer: Any
    vocab_size: int


def open_teacher(config: Config, folder: ModelFolder | None = None) -> Teacher:
    """Opens the teacher of the experiment, or `folder`, its folder, if it was found before.

    Raises:
        UserError: if it is missing or damaged.
    """
    folder = folder or find_teacher(config)
    return Teacher(folder, folder.tokenizer, folder.load_config().vocab_size)


def or_note(open_it: Callable[[], T], what: str, notes: list[str]) -> T | None:
    """Returns the result of `open_it`; if that raises a UserError, adds a note that `what` is missing and why."""
    try:
        return open_it()
    except UserError as error:
        notes.append(f"no {what}: {error}")
        return None


def note_lines(notes: list[str]) -> list[str]:
    """Formats the notes as the last lines of a report."""
    return ["", *(f"({note})" for note in notes)] if notes else []
