"""A pretrained model as the student (`student.path`): checked like a teacher, and copied into the work directory.

It has the teacher's tokenizer, and may have another architecture, width, depth and padded vocabulary. The copy is
ordinary safetensors whatever the model's own files are; changing the model later leaves the student unchanged.
"""

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe, write_json
from dskd.config import Config
from dskd.console import say, stage
from dskd.errors import UserError
from dskd.models.checks.architecture import check_architecture
from dskd.models.files.folder import ModelFolder, attention_key, find_pretrained_student
from dskd.models.files.weights import TensorReader, write_weights
from dskd.models.limits import vocabulary_size
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.stored_names import check_stored_tensors
from dskd.models.structure.trained import choose_trained
from dskd.students.cutting import copy_other_files, load_if_small, without_place
from dskd.students.same_tokenizer import require_same_tokenizer


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the student: what determines its files. Where the model is found is not part of it."""
    source = find_pretrained_student(config)
    inputs = {"model": source.digest, "tokenizer": source.tokenizer_digest}
    return Recipe(kinds.STUDENT.name, inputs, {"origin": "path"}, teacher.digest, teacher.tokenizer_digest)


def build_pretrained_student(config: Config, teacher: ModelFolder) -> None:
    """Copies the model that `student.path` names to `WORKDIR/student`.

    Raises:
        UserError: when the model is refused, its tokenizer is not the teacher's, or it lacks layers that are to be
            trained.
    """
    source = find_pretrained_student(config)
    target = config.path(kinds.STUDENT.folder)
    with stage("student: a pretrained model", reads=[source.path], writes=target):
        reader = TensorReader(source.path)
        model = check_architecture(source, config.corpus)
        check_stored_tensors(model, reader, source)
        require_same_tokenizer(teacher, source)
        _require_all_tokens(teacher, source)
        choose_trained(model, config.student)  # refuses layers that it lacks
        with build_artifact(target, recipe(config, teacher)) as building:
            values = without_place(source.config_values() | attention_key(source.load_config()))
            write_json(building.folder / "config.json", values)
            copy_other_files(source, building.folder)
            size = write_weights(building.folder, reader, {name: name for name in reader.names})
            student = ModelFolder(building.folder, "")
            check_stored_tensors(empty_model(student), TensorReader(student.path), student)
            load_if_small(student)
            settings = config.student
            building.facts.update(
                origin="path", path=settings.path, revision=settings.revision, folder=str(source.path), size_bytes=size
            )
        say(f"  {type(model).__name__} from {source.path}; {size / 1e6:,.1f} MB")


def _require_all_tokens(teacher: ModelFolder, student: ModelFolder) -> None:
    """Checks that the student has every token that a text of the teacher can have; paddings may differ.

    Raises:
        UserError: if it has fewer.
    """
    size, needed = vocabulary_size(student.load_config()), max(teacher.tokenizer.get_vocab().values()) + 1
    if (teacher_size := vocabulary_size(teacher.load_config())) is not None:
        needed = min(needed, teacher_size)
    if size is not None and size < needed:
        raise UserError(
            f"student.path: {student.path} has {size} tokens (vocab_size of its config.json), 0 to {size - 1}, and "
            f"texts of the teacher can have {needed}; name another student, or give it more embeddings "
            "(model.resize_token_embeddings)"
        )
