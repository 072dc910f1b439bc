"""Opening the artifacts that the inspections read; for a missing one, the report gets a line on how to make it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dskd.artifacts.manifest import Manifest
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.folder import ModelFolder, find_teacher
from dskd.senses.dictionary import SenseDictionary, load_fitting_dictionary

T = TypeVar("T")


@dataclass(frozen=True)
class Teacher:
    """The parts of the teacher that inspections need: its folder, its tokenizer, and its model's number of tokens."""

    folder: ModelFolder
    tokenizer: Any
    vocab_size: int


@dataclass(frozen=True)
class Senses:
    """The sense dictionary of the experiment, which was checked against the teacher."""

    dictionary: SenseDictionary
    manifest: Manifest


def open_teacher(config: Config) -> Teacher:
    """Opens the teacher of the experiment.

    Raises:
        UserError: when it is missing or damaged.
    """
    folder = find_teacher(config)
    return Teacher(folder, folder.load_tokenizer(), folder.load_config().vocab_size)


def open_senses(config: Config, teacher: Teacher) -> Senses:
    """Opens the sense dictionary, and checks it against the teacher.

    Raises:
        UserError: when it is missing, damaged, or was made for another teacher.
    """
    return Senses(*load_fitting_dictionary(config, teacher.folder))


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
