"""Cutting the student from the teacher: a file operation that copies some of the teacher's layers, tensor by tensor.

Embeddings, final norm and head are copied too. Tensors are read one at a time and written in files of a few gigabytes,
so cutting a student from a teacher of any size takes about as long as copying the files. The result is then checked
against its architecture and, unless it is large, loaded with transformers and compared with the teacher.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.hashing import MANIFEST_NAME
from dskd.artifacts.manifest import Recipe, read_manifest, write_json
from dskd.config import Config
from dskd.console import say, stage
from dskd.models.checks.architecture import check_architecture
from dskd.models.checks.loading import load_with_transformers
from dskd.models.files.folder import ADAPTER_CONFIG, CONFIG_AND_TOKENIZER, ModelFolder, attention_key
from dskd.models.files.weights import LAYER_NAME, WEIGHTS_INDEX, TensorReader, renumber_layer, write_weights
from dskd.models.running.precision import resolve_precision
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.cut_config import cut_config
from dskd.models.structure.layers import check_kinds
from dskd.models.structure.stored_names import check_stored_tensors
from dskd.students.measuring import measure_importance
from dskd.students.pruned_teacher import can_be_compared, compare_with_pruned_teacher
from dskd.students.spacing import as_text, choose_layers, num_removed_layers, settings_of

_NOT_COPIED = ("config.json", WEIGHTS_INDEX, MANIFEST_NAME, ADAPTER_CONFIG, "hf_quant_config.json")
# Keys of config.json that say where transformers found a model: in a folder, or what a GGUF file calls it.
_PLACES = ("_name_or_path", "_model_name_or_path")
_LOADED_ELEMENTS = 2**30  # a student with at most this many parameters is loaded as a test


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the cut student: what determines its files.

    Which layers are trained is a part of it only if it determines which layers are kept.

    Raises:
        UserError: when the choice of layers depends on text, and there are no sequences.
    """
    settings, inputs = settings_of(config.student), {}
    if config.student.is_measured:
        inputs["sequences"] = read_manifest(config.path(kinds.SEQUENCES.folder), kinds.SEQUENCES.name).digest
        settings |= {"seed": config.seed, "precision": resolve_precision(config.precision)}
    return Recipe(kinds.STUDENT.name, inputs, settings, teacher=teacher.digest, tokenizer=teacher.tokenizer_digest)


def build_cut_student(config: Config, teacher: ModelFolder) -> None:
    """Cuts the student and writes `WORKDIR/student`.

    Raises:
        UserError: when the teacher is refused, or no student can be made of the chosen layers.
    """
    target = config.path(kinds.STUDENT.folder)
    with stage("student: cut from the teacher", reads=[teacher.path], writes=target):
        values, full = teacher.config_values(), teacher.load_config()
        whole = check_architecture(teacher, config.corpus)
        check_stored_tensors(whole, TensorReader(teacher.path), teacher)
        importance = None
        if config.student.is_measured:
            size = num_removed_layers(config.student, full.num_hidden_layers)
            importance = measure_importance(config, teacher, size)
        layers = choose_layers(config.student, full.num_hidden_layers, importance)
        with build_artifact(target, recipe(config, teacher)) as building:
            cut_values = cut_config(values, layers, full.to_dict()) | attention_key(full)
            write_json(building.folder / "config.json", without_place(cut_values))
            copy_other_files(teacher, building.folder)
            student = ModelFolder(building.folder, "", teacher.trust_remote_code)
            check_kinds(whole, empty_model(student), layers)
            size_bytes = cut(teacher.path, layers, building.folder)
            check_student(student, teacher, layers)
            building.facts.update(layers=layers, size_bytes=size_bytes)
            if importance is not None:
                building.facts["importance"] = importance.as_facts()
        say(f"  the teacher's layers {as_text(layers)}; {size_bytes / 1e6:,.1f} MB")


def without_place(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a config.json without the path from which the model was loaded once, or the name of a GGUF
    file.
    """
    return {key: value for key, value in values.items() if key not in _PLACES}


def copy_other_files(source: ModelFolder, target: Path) -> None:
    """Copies a model's tokenizer, its generation config and, if `trust_remote_code` allows it, the model's own code."""
    for pattern in (*CONFIG_AND_TOKENIZER, *(["*.py"] if source.trust_remote_code else [])):
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
        say(
            "  the teacher is too large to run next to the student here, so only settings, shapes and tensors were "
            "compared"
        )
        load_if_small(student)
        return
    compare_with_pruned_teacher(teacher, _load(student, torch.float32), layers)


def load_if_small(student: ModelFolder) -> None:
    """Loads a student with transformers, unless it is large, to see that nothing is missing.

    Raises:
        UserError: when it cannot be loaded.
    """
    if TensorReader(student.path).numel <= _LOADED_ELEMENTS:
        _load(student, "auto")


def _load(student: ModelFolder, dtype: torch.dtype | str) -> Any:
    return load_with_transformers(student.path, dtype, trust_remote_code=student.trust_remote_code)


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
