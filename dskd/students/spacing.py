"""The choice of the teacher's layers that a student keeps, by `student.layers` and `student.spacing`.

`first` is the paper's: the lowest layers. `ends` keeps the teacher's last layers too, which turn states into
predictions, and are the ones that are trained. `importance` keeps the same last layers, and removes the block of layers
that changes the states least (:mod:`dskd.students.importance`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config, StudentConfig
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder


@dataclass(frozen=True)
class Importance:
    """The measured importance of a teacher's layers: mean angles in half turns, from 0 (no change) to 1.

    `layers` has the angle of each layer, and `blocks` that of each block of as many layers as a student lacks, by the
    number of its first layer.
    """

    samples: int  # sequences
    tokens: int
    layers: tuple[float, ...]
    blocks: tuple[float, ...]

    @property
    def block_size(self) -> int:
        """The number of layers of a block."""
        return len(self.layers) - len(self.blocks) + 1

    def as_facts(self) -> dict[str, Any]:
        """Returns what the student's manifest records."""
        return asdict(self)

    @classmethod
    def of(cls, manifest: Manifest) -> "Importance | None":
        """Returns what the manifest of a student records; None if its layers were not measured."""
        facts = manifest.facts.get("importance")
        if facts is None:
            return None
        return cls(facts["samples"], facts["tokens"], tuple(facts["layers"]), tuple(facts["blocks"]))


def settings_of(student: StudentConfig) -> dict[str, Any]:
    """Returns the settings that determine the choice, for the recipe of a student."""
    settings = {key: student.as_dict()[key] for key in ("layers", "spacing")}
    if isinstance(student.layers, tuple):  # `spacing` is without effect, and `first` was its default once
        settings["spacing"] = "first"
    if student.last_layers_are_kept:
        settings["last_layers"] = student.last_layers
    if student.is_measured:
        settings["importance_samples"] = student.importance_samples
    return settings


def choose_layers(student: StudentConfig, num_layers: int, importance: Importance | None = None) -> list[int]:
    """Returns which of the teacher's layers the student keeps, ascending.

    Args:
        student: the student's section of the config.
        num_layers: the number of the teacher's layers.
        importance: the measured layers of the teacher, for a student with `is_measured`.

    Raises:
        UserError: when the teacher has no such layers, or `importance` has nothing to remove.
    """
    layers = student.layers
    if isinstance(layers, tuple):
        if missing := [layer for layer in layers if layer >= num_layers]:
            raise UserError(f"student.layers: the teacher has layers 0 to {num_layers - 1}, so there is no {missing}")
        return list(layers)
    _require_enough(layers, num_layers)
    if student.spacing == "first":
        return list(range(layers))
    if student.spacing == "even":
        # Keep the first and the last layer, and space the others evenly between them.
        return [0] if layers == 1 else [round(i * (num_layers - 1) / (layers - 1)) for i in range(layers)]
    begin = layers - student.last_layers
    if student.spacing == "importance":
        size = num_removed_layers(student, num_layers)
        assert importance is not None and importance.block_size == size, "measured for this choice"
        begin = min(range(begin + 1), key=lambda layer: importance.blocks[layer])
    return [*range(begin), *range(begin + num_layers - layers, num_layers)]


def require_layers(student: StudentConfig, num_layers: int) -> None:
    """Checks that a teacher with `num_layers` layers has those that the student keeps, if it is cut from the teacher.

    Raises:
        UserError: when it lacks some, or `importance` has nothing to remove.
    """
    if student.origin != "cut":
        return
    if student.is_measured:
        require_removable(student, num_layers)
    else:
        choose_layers(student, num_layers)


def _require_enough(kept: int, num_layers: int) -> None:
    """Refuses a student that keeps more layers than the teacher has."""
    if kept > num_layers:
        raise UserError(f"student.layers: the teacher has {num_layers} layers, so the student cannot keep {kept}")


def num_removed_layers(student: StudentConfig, num_layers: int) -> int:
    """Returns the number of layers that `importance` removes from a teacher with `num_layers` layers.

    Raises:
        UserError: when the teacher has fewer layers than the student keeps, or as many.
    """
    require_removable(student, num_layers)
    return num_layers - student.num_layers


def require_removable(student: StudentConfig, num_layers: int) -> None:
    """Checks that a teacher with `num_layers` layers has more of them than the student keeps.

    Raises:
        UserError: when it has fewer, or as many.
    """
    _require_enough(student.num_layers, num_layers)
    if student.num_layers == num_layers:
        raise UserError(
            f"student.spacing: importance removes layers, but student.layers keeps all of the teacher's {num_layers}; "
            f"set student.layers to {num_layers - 1} or less, or student.spacing to first"
        )


def chosen_layers(config: Config, num_layers: int, *, teacher: str | None = None) -> list[int]:
    """Returns which of the teacher's layers the config's student keeps; for `importance`, as they were measured when
    the student in the work directory was cut.

    Args:
        config: the experiment.
        num_layers: the number of the teacher's layers.
        teacher: the teacher's digest; None if it is not known.

    Raises:
        UserError: when the teacher has no such layers, or there is no student that was cut with these keys.
    """
    if not config.student.is_measured:
        return choose_layers(config.student, num_layers)
    require_removable(config.student, num_layers)
    manifest = read_manifest(config.path(kinds.STUDENT.folder), kinds.STUDENT.name)
    return choose_layers(config.student, num_layers, _measured(config, manifest, num_layers, teacher))


def require_chosen_layers(config: Config, teacher: ModelFolder, student: ModelFolder) -> None:
    """Checks that a student cut from `teacher` has the layers that the config chooses; they may have changed since.

    A student that was cut from another teacher is not compared: its layers are numbered as that teacher's.

    Raises:
        UserError: if it has others, or the teacher has no such layers; it names both, and the command that cuts again.
    """
    manifest = read_manifest(student.path, kinds.STUDENT.name)
    if manifest.teacher != teacher.digest:
        return
    kept, num_layers = list(manifest.facts["layers"]), teacher.load_config().num_hidden_layers
    importance = _measured(config, manifest, num_layers, teacher.digest) if config.student.is_measured else None
    chosen = choose_layers(config.student, num_layers, importance)
    if kept != chosen:
        keys = "student.layers and student.spacing"
        if config.student.last_layers_are_kept:
            keys = "student.layers, student.spacing and student.train_layers"
        removed = " and remove student.spacing and student.importance_samples" if config.student.is_measured else ""
        raise UserError(
            f"{student.path}: the student has the teacher's layers {as_text(kept)}, but {keys} choose "
            f"{as_text(chosen)}; cut it again with `{kinds.STUDENT.made_by}`, or set student.layers to "
            f"[{as_text(kept)}]{removed}"
        )


def _measured(config: Config, manifest: Manifest, num_layers: int, teacher: str | None) -> Importance:
    """Returns what was measured when a student was cut with the keys of this config.

    Raises:
        UserError: when the student was cut with others, or from another teacher.
    """
    student, importance = config.student, Importance.of(manifest)
    keys = ("layers", "importance_samples")
    if (
        importance is None
        or any(manifest.config.get(key) != getattr(student, key) for key in keys)
        or teacher not in (None, manifest.teacher)
        or len(importance.layers) != num_layers
    ):
        settings = " and ".join(f"student.{key}: {getattr(student, key)}" for key in keys)
        raise UserError(
            f"{config.path(kinds.STUDENT.folder)}: this student was not cut from this teacher with student.spacing: "
            f"importance, {settings}, so its manifest lacks the measurements that choose its layers; cut it again with "
            f"`{kinds.STUDENT.made_by}`"
        )
    return importance


def as_text(layers: Sequence[int]) -> str:
    """Returns the numbers of layers as text."""
    return ", ".join(map(str, layers))
