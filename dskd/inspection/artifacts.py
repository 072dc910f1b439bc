"""What the inspections read, as far as it is there; what is not becomes a line that says how to make it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config
from dskd.errors import UserError
from dskd.lexicon.relations import FILE
from dskd.models.folder import ModelFolder, find_teacher
from dskd.senses.dictionary import SenseDictionary, load_fitting_dictionary

T = TypeVar("T")


@dataclass(frozen=True)
class Teacher:
    """The teacher as far as looking needs it: its tokenizer, and how many tokens its model knows."""

    folder: ModelFolder
    tokenizer: Any
    vocab_size: int


@dataclass(frozen=True)
class Senses:
    """The sense dictionary of the experiment, known to fit the teacher."""

    dictionary: SenseDictionary
    manifest: Manifest


def open_teacher(config: Config) -> Teacher:
    """The teacher of the experiment.

    Raises:
        UserError: when it is missing or damaged.
    """
    folder = find_teacher(config)
    return Teacher(folder, folder.load_tokenizer(), folder.load_config().vocab_size)


def open_senses(config: Config, teacher: Teacher) -> Senses:
    """The sense dictionary, checked against the teacher.

    Raises:
        UserError: when it is missing, damaged, or was made for another teacher.
    """
    return Senses(*load_fitting_dictionary(config, teacher.folder))


def lexicon_manifest(config: Config) -> Manifest:
    """The manifest of `WORKDIR/lexicon`.

    Raises:
        UserError: when there is no lexicon, or it was damaged.
    """
    return read_manifest(config.path(kinds.LEXICON.folder), "lexicon")


def read_relations(config: Config, **options: Any) -> pa.Table:
    """The table of `WORKDIR/lexicon`, or the part of it that `options` of pyarrow's `read_table` ask for.

    Raises:
        UserError: when it is no table.
    """
    path = config.path(kinds.LEXICON.folder, FILE)
    try:
        return pq.read_table(path, **options)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it again with `{kinds.LEXICON.made_by}`") from None


def if_there(open_it: Callable[[], T], what: str, notes: list[str]) -> T | None:
    """What `open_it` returns; or None, with a line in `notes` that says what is not shown, and why."""
    try:
        return open_it()
    except UserError as error:
        notes.append(f"no {what}: {error}")
        return None
