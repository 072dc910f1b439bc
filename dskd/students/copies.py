"""The chat template and the generation config of the student: copies of those of the model that it is made from.

They change no weight and are not in the student's recipe, so changing them does not invalidate a student's training.
"""

import json
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.manifest import read_manifest
from dskd.config import Config
from dskd.console import warn
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder, find_pretrained_student
from dskd.models.running.generation import GENERATION_CONFIG


def copies_are_current(config: Config, teacher: ModelFolder) -> bool:
    """Returns False if the student should be made again because its copies are no longer those of its source.

    That would discard its training, which the copies do not change. So if there is training that is not repeated
    anyway, warns and returns True.

    Raises:
        UserError: when there is no model at `student.path`.
    """
    source = source_of(config, teacher)
    changed = changed_copies(config, source)
    if not changed:
        return True
    if not _has_training(config):
        return False
    _warn(config, source, changed)
    return True


def warn_of_old_copies(config: Config, teacher: ModelFolder) -> None:
    """Warns if the student's copies are no longer those of its source. Does nothing if the source is gone."""
    source = teacher.path
    if config.student.origin == "path":  # the folder it was copied from, so that no model is searched or hashed
        source = Path(read_manifest(config.path(kinds.STUDENT.folder), kinds.STUDENT.name).facts["folder"])
    if source.is_dir() and (changed := changed_copies(config, source)):
        _warn(config, source, changed)


def _warn(config: Config, source: Path, changed: list[str]) -> None:
    student, what = config.path(kinds.STUDENT.folder), " and ".join(changed)
    warn(
        f"{source}: the {what} changed after {student} was made from it, and that student and its exports keep the old "
        f"{what}. To use the new one, put it into a copy of the export; or make the student again with "
        f"`{kinds.STUDENT.made_by}`, and train its runs again"
    )


def source_of(config: Config, teacher: ModelFolder) -> Path:
    """Returns the folder of the model that the student's small files are copied from.

    Raises:
        UserError: when there is no model at `student.path`.
    """
    return find_pretrained_student(config).path if config.student.origin == "path" else teacher.path


def changed_copies(config: Config, source: Path) -> list[str]:
    """Returns which of the student's copies are no longer those of its source, for messages."""
    student = config.path(kinds.STUDENT.folder)
    changed = []
    if _chat_template(source) != _chat_template(student):
        changed.append("chat template")
    generation = [_content(folder / GENERATION_CONFIG) for folder in (source, student)]
    # A new student has a generation config of its own if the teacher has none.
    is_own = generation[0] is None and config.student.origin == "from_config"
    if generation[0] != generation[1] and not is_own:
        changed.append("generation config")
    return changed


def _chat_template(folder: Path) -> object:
    template = _content(folder / "chat_template.jinja")
    if template is not None:
        return template.decode("utf-8", "replace")
    try:
        return json.loads(_content(folder / "tokenizer_config.json") or b"{}").get("chat_template")
    except ValueError:  # a damaged copy
        return None


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _has_training(config: Config) -> bool:
    """Returns True if there are checkpoints, unless their shards are of other sequences, so that training repeats."""
    if not any(config.path(kinds.CHECKPOINT.folder).glob("*/step-*")):
        return False
    try:
        shards = read_manifest(config.path(kinds.SHARDS.folder, "train"), kinds.SHARDS.name, files_are_here=False)
        sequences = read_manifest(config.path(kinds.SEQUENCES.folder), kinds.SEQUENCES.name)
    except UserError:
        return True
    return shards.inputs.get("sequences") == sequences.digest
