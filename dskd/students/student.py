"""The student of a work directory: cut from the teacher, another pretrained model, or new with random weights.

All three are Hugging Face folders of the same kind of artifact, which training treats alike. In the manifest of a cut
student the fact `layers` has the teacher's layers; the manifests of the others have the fact `origin` instead.
"""

from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, Recipe, read_manifest
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder, find_pretrained_student, find_teacher
from dskd.students import cutting, new, pretrained
from dskd.students.spacing import require_chosen_layers

_MADE = {
    "cut": "cut from a teacher (student.layers)",
    "path": "copied from a pretrained model (student.path)",
    "from_config": "made with random weights (student.from_config)",
}


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the config's student: what determines its weights and tokens.

    What is trained is not part of it, nor are the files that :mod:`dskd.students.copies` compares.

    Raises:
        UserError: when there is no model at `student.path`.
    """
    if config.student.origin == "cut":
        return cutting.recipe(config, teacher)
    if config.student.origin == "path":
        return pretrained.recipe(config, teacher)
    return new.recipe(config, teacher)


def build_student(config: Config, teacher: ModelFolder | None = None) -> None:
    """Writes `WORKDIR/student`; `teacher` is the config's, if it has already been found.

    Raises:
        UserError: when the teacher or the student is refused.
    """
    teacher = teacher or find_teacher(config)
    if config.student.origin == "cut":
        cutting.build_cut_student(config, teacher)
    elif config.student.origin == "path":
        pretrained.build_pretrained_student(config, teacher)
    else:
        new.build_new_student(config, teacher)


def find_student(config: Config) -> ModelFolder:
    """Returns the student of a work directory, before it is trained.

    Raises:
        UserError: when it is missing or damaged.
    """
    student, _ = open_made_model(config, config.path(kinds.STUDENT.folder), kinds.STUDENT.name)
    return student


def open_made_model(config: Config, folder: Path, kind: str) -> tuple[ModelFolder, Manifest]:
    """Returns the model in a student's or an export's folder, and its manifest; `kind` is the manifest's.

    Raises:
        UserError: when it is missing or damaged.
    """
    manifest = read_manifest(folder, kind)
    return ModelFolder(folder, manifest.digest, trusts_code(config)), manifest


def trusts_code(config: Config) -> bool:
    """Returns True if code that comes with the student may run: the teacher's, if the student is cut from it."""
    return config.teacher.trust_remote_code and config.student.origin == "cut"


def origin_of(manifest: Manifest) -> str:
    """Returns how the student with this manifest was made: `cut`, `path` or `from_config`."""
    return str(manifest.facts.get("origin", "cut"))


def require_configured_student(config: Config, teacher: ModelFolder, student: ModelFolder) -> None:
    """Checks that the student in the work directory is the one that the config names; it may have changed since.

    Raises:
        UserError: if it is another; it names both, and the command that makes the student again.
    """
    manifest = read_manifest(student.path, kinds.STUDENT.name)
    made, chosen = origin_of(manifest), config.student.origin
    again = f"make it again with `{kinds.STUDENT.made_by}`"
    if made != chosen:
        raise UserError(
            f"{student.path}: the student was {_MADE[made]}, but the config wants one {_MADE[chosen]}; {again}"
        )
    if chosen == "cut":
        require_chosen_layers(config, teacher, student)
        return
    if manifest.tokenizer != teacher.tokenizer_digest:
        raise UserError(
            f"{student.path}: the student was made for a teacher with another tokenizer than that of {teacher.path}; "
            f"{again}"
        )
    if chosen == "from_config":
        expected = new.recipe(config, teacher).config
        # Runs may have seeds of their own, and all have the student of the first.
        changed = [key for key, value in expected.items() if key != "seed" and manifest.config.get(key) != value]
        if changed:
            different = ", ".join(f"{key} {manifest.config.get(key)} and {expected[key]}" for key in changed)
            raise UserError(f"{student.path}: student and config differ: {different}; {again}")
        return
    copied = manifest.facts["path"], manifest.facts["revision"]
    named = config.student.path, config.student.revision
    # Another place may have the same model, so it is read before it is refused.
    if copied != named and manifest.inputs["model"] != find_pretrained_student(config).digest:
        of_copy, of_config = (
            f"{path}{'' if revision is None else f' ({revision})'}" for path, revision in (copied, named)
        )
        raise UserError(
            f"{student.path}: the student is a copy of {of_copy}, but student.path is {of_config}, another model; "
            f"{again}"
        )
