"""Cutting the student from the teacher: a file operation that copies some of the teacher's layers, tensor by tensor.

Embeddings, final norm and head are copied too. Tensors are read one at a time and written in files of a few gigabytes,
so cutting a student from a teacher of any size takes about as long as copying the files. The result is then checked
against its architecture and, unless it is large, loaded with transformers and compared with the teacher.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe, read_manifest, write_json
from dskd.config import Config, StudentConfig
from dskd.console import say, stage
from dskd.errors import UserError, listed
from dskd.models.architecture import check_architecture
from dskd.models.causal_lm import empty_model
from dskd.models.cut_config import cut_config
from dskd.models.folder import ModelFolder, find_teacher, load_tokenizer, tokenizer_digest
from dskd.models.layers import check_kinds
from dskd.models.pruned_teacher import can_be_compared, compare_with_pruned_teacher
from dskd.models.stored_names import check_stored_tensors
from dskd.models.weights import LAYER_NAME, WEIGHTS_INDEX, TensorReader, renumber_layer, write_weights

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
_NOT_COPIED = ("config.json", WEIGHTS_INDEX, "manifest.json", "adapter_config.json", "hf_quant_config.json")
_LOADED_ELEMENTS = 2**30  # a student with at most this many parameters is loaded as a test


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the cut student: what determines its files. Which layers are trained is not part of it."""
    settings = {key: config.student.as_dict()[key] for key in ("layers", "spacing")}
    return Recipe("student", {}, settings, teacher=teacher.digest, tokenizer=teacher.tokenizer_digest)


def build_student(config: Config) -> None:
    """Cuts the student and writes `WORKDIR/student`.

    Raises:
        UserError: when the teacher is refused, or no student can be made of the chosen layers.
    """
    teacher = find_teacher(config)
    target = config.path(kinds.STUDENT.folder)
    with stage("student: cut from the teacher", reads=[teacher.path], writes=target):
        values, full = teacher.config_values(), teacher.load_config()
        layers = choose_layers(config.student, full.num_hidden_layers)
        whole = check_architecture(teacher, config.corpus)
        check_stored_tensors(whole, TensorReader(teacher.path), teacher)
        with build_artifact(target, recipe(config, teacher)) as building:
            write_json(building.folder / "config.json", cut_config(values, layers, full.to_dict()))
            copy_other_files(teacher, building.folder)
            student = ModelFolder(building.folder, "", "", teacher.trust_remote_code)
            check_kinds(whole, empty_model(student), layers)
            size = cut(teacher.path, layers, building.folder)
            check_student(student, teacher, layers)
            building.facts.update(layers=layers, size_bytes=size)
        say(f"  the teacher's layers {_numbers(layers)}; {size / 1e6:,.1f} MB")


def find_student(config: Config) -> ModelFolder:
    """Returns the student of a work directory, before it is trained.

    Raises:
        UserError: when it is missing or damaged.
    """
    folder = config.path(kinds.STUDENT.folder)
    manifest = read_manifest(folder, "student")
    trusted = trusts_code(config)
    digest = tokenizer_digest(load_tokenizer(folder, trust_remote_code=trusted))
    return ModelFolder(folder, manifest.digest, digest, trusted)


def trusts_code(config: Config) -> bool:
    """Returns True if code that comes with the student may run: the teacher's, if the student is cut from it."""
    return config.teacher.trust_remote_code and config.student.origin == "cut"


def require_chosen_layers(config: Config, teacher: ModelFolder, student: ModelFolder) -> None:
    """Checks that a student cut from `teacher` has the layers that the config chooses; they may have changed since.

    A student that was cut from another teacher is not compared: its layers are numbered as that teacher's.

    Raises:
        UserError: if it has others, or the teacher has no such layers; it names both, and the command that cuts again.
    """
    manifest = read_manifest(student.path, "student")
    if manifest.teacher != teacher.digest:
        return
    found = list(manifest.facts["layers"])
    chosen = choose_layers(config.student, teacher.load_config().num_hidden_layers)
    if found != chosen:
        raise UserError(
            f"{student.path}: the student has the teacher's layers {_numbers(found)}, but student.layers and "
            f"student.spacing choose {_numbers(chosen)}; cut it again with `{kinds.STUDENT.made_by}`, or set "
            f"student.layers to [{_numbers(found)}]"
        )


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def choose_layers(student: StudentConfig, num_layers: int) -> list[int]:
    """Returns which of the teacher's layers the student keeps, ascending.

    Raises:
        UserError: when the teacher has no such layers.
    """
    layers = student.layers
    if isinstance(layers, tuple):
        if missing := [layer for layer in layers if layer >= num_layers]:
            raise UserError(f"student.layers: the teacher has layers 0 to {num_layers - 1}, so there is no {missing}")
        return list(layers)
    if not 1 <= layers <= num_layers:
        raise UserError(f"student.layers: the teacher has {num_layers} layers, so the student cannot keep {layers}")
    if student.spacing == "first":
        return list(range(layers))
    # Keep the first and the last layer, and space the others evenly between them.
    return [0] if layers == 1 else [round(i * (num_layers - 1) / (layers - 1)) for i in range(layers)]


def copy_other_files(source: ModelFolder, target: Path) -> None:
    """Copies a model's tokenizer, its generation config and, if `trust_remote_code` allows it, the model's own code.

    An adapter's config in the folder of a merged model is not copied: loading the student would then look for the
    adapter's base model.
    """
    for pattern in (*_COPIED, *(["*.py"] if source.trust_remote_code else [])):
        for file in source.path.glob(pattern):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, target / file.name)


def check_student(student: ModelFolder, teacher: ModelFolder, layers: list[int]) -> None:
    """Checks that a cut student's tensors fit its architecture and, if it is not large, loads and runs it.

    Args:
        student: the cut student.
        teacher: its teacher.
        layers: the teacher's layers that the student keeps.

    Raises:
        UserError: when tensors do not fit, the student cannot be loaded, or it computes something different from the
            teacher without its other layers.
    """
    reader = TensorReader(student.path)
    check_stored_tensors(empty_model(student), reader, student)
    if not can_be_compared(teacher):
        say("  the teacher is too large to run both; their settings, shapes and tensors were compared")
        load_if_small(student)
        return
    compare_with_pruned_teacher(teacher, _load_with_transformers(student, torch.float32), layers)


def load_if_small(student: ModelFolder) -> None:
    """Loads a student with transformers, unless it is large, to see that nothing is missing.

    Raises:
        UserError: when it cannot be loaded.
    """
    reader = TensorReader(student.path)
    if sum(math.prod(reader.shape(name)) for name in reader.names) <= _LOADED_ELEMENTS:
        _load_with_transformers(student, "auto")


def _load_with_transformers(student: ModelFolder, dtype: torch.dtype | str) -> Any:
    """Returns the student as transformers loads it.

    Raises:
        UserError: when it cannot be loaded, or not all of its tensors are there, with all problems found.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            student.path,
            dtype=dtype,
            trust_remote_code=student.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, KeyError) as error:
        raise UserError(f"{student.path}: the student cannot be loaded; transformers: {error}") from error
    problems = [
        *(f"there is no tensor {name}" for name in sorted(loading["missing_keys"])),
        *(f"{entry if isinstance(entry, str) else entry[0]} has another shape" for entry in loading["mismatched_keys"]),
    ]
    if problems:
        raise UserError(listed(f"{student.path}: the student cannot be loaded", problems))
    return model


def cut(teacher: Path, layers: list[int], target: Path) -> int:
    """Writes the teacher's weights into `target`, keeping only `layers`, renumbered from 0.

    Returns:
        The size of the weights in bytes.
    """
    reader = TensorReader(teacher)
    new_number = {old: new for new, old in enumerate(layers)}
    kept = {}
    for name in reader.names:
        layer = LAYER_NAME.search(name)
        if layer is None:
            kept[name] = name
        elif int(layer.group(1)) in new_number:
            kept[name] = renumber_layer(name, new_number[int(layer.group(1))])
    return write_weights(target, reader, kept)
