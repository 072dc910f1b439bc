"""The student is a file operation: some of the teacher's layers, cut from its safetensors tensor by tensor.

Embeddings, final norm and head are copied. No model is built and no more than one tensor is in memory, so cutting a
student from a teacher of any size takes as long as copying the files.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dskd.config import Config, StudentConfig
from dskd.console import progress, say, stage
from dskd.errors import UserError
from dskd.folders import full_disk_is_said
from dskd.manifest import Recipe, build_artifact, read_manifest, write_json
from dskd.model_folder import (
    LAYER_NAME,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    ModelFolder,
    TensorReader,
    find_teacher,
    load_tokenizer,
    renumber_layer,
    tokenizer_digest,
)

FOLDER = "student"
MADE_BY = "dskd student --config FILE"
_FILE_BYTES = 4 * 2**30
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """What decides the cut student; which layers are trained is not part of it."""
    settings = {key: config.student.as_dict()[key] for key in ("layers", "spacing")}
    return Recipe("student", {}, settings, teacher=teacher.digest, tokenizer=teacher.tokenizer_digest)


def build_student(config: Config) -> None:
    """Cuts the student and writes `WORKDIR/student`."""
    teacher = find_teacher(config)
    target = config.path(FOLDER)
    with stage("student: cut from the teacher", reads=[teacher.path], writes=target):
        model_config = teacher.config_values()
        layers = choose_layers(config.student, teacher.load_config().num_hidden_layers)
        with build_artifact(target, recipe(config, teacher)) as building:
            size = cut(teacher.path, layers, building.folder)
            write_json(building.folder / "config.json", cut_config(model_config, layers))
            building.facts.update(layers=layers, size_bytes=size)
        say(f"  the teacher's layers {', '.join(map(str, layers))}; {size / 1e6:,.1f} MB")


def find_student(config: Config) -> ModelFolder:
    """The cut student of a work directory.

    Raises:
        UserError: when it is missing, or damaged.
    """
    folder = config.path(FOLDER)
    manifest = read_manifest(folder, "student", made_by=MADE_BY)
    return ModelFolder(
        folder, manifest.digest, tokenizer_digest(load_tokenizer(folder)), config.teacher.trust_remote_code
    )


def choose_layers(student: StudentConfig, num_layers: int) -> list[int]:
    """Which of the teacher's layers the student keeps, ascending.

    Raises:
        UserError: when the teacher has no such layers.
    """
    wanted = student.layers
    if isinstance(wanted, tuple):
        missing = [layer for layer in wanted if layer >= num_layers]
        if missing:
            raise UserError(f"student.layers: the teacher has layers 0 to {num_layers - 1}, so there is no {missing}")
        return list(wanted)
    if not 1 <= wanted <= num_layers:
        raise UserError(f"student.layers: the teacher has {num_layers} layers, so the student cannot keep {wanted}")
    if student.spacing == "first":
        return list(range(wanted))
    # First and last layer always, the others evenly between them.
    return [0] if wanted == 1 else [round(i * (num_layers - 1) / (wanted - 1)) for i in range(wanted)]


def cut(teacher: Path, layers: list[int], target: Path) -> int:
    """Writes the teacher's files with only `layers`, renumbered from 0, into `target`.

    Returns:
        Bytes of weights.
    """
    for pattern in _COPIED:
        for file in teacher.glob(pattern):
            if file.name not in ("config.json", WEIGHTS_INDEX, "manifest.json"):
                shutil.copyfile(file, target / file.name)
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


def write_weights(
    target: Path, reader: TensorReader, new_names: dict[str, str], replaced: dict[str, torch.Tensor] | None = None
) -> int:
    """Copies tensors into safetensors files of a few gigabytes, with an index when there are several.

    Args:
        target: the folder to write into.
        reader: where the tensors are.
        new_names: {name there: name here}.
        replaced: tensors by their new name that take the place of those read.

    Returns:
        Bytes of weights.
    """
    replaced = replaced or {}
    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            with full_disk_is_said(target):
                save_file(pending, target / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(pending))
            pending.clear()
            pending_bytes = 0

    for old, new in progress(new_names.items(), total=len(new_names), label="copying", unit="tensors"):
        tensor = replaced[new] if new in replaced else reader.read(old)
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > _FILE_BYTES:
            flush()
        pending[new] = tensor.contiguous()
        pending_bytes += size
        total += size
    flush()
    if len(files) == 1:
        (target / "part-0").rename(target / WEIGHTS_FILE)
        return total
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (target / f"part-{number}").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(target / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def cut_config(model_config: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The teacher's `config.json` for the student: the number of layers, and lists with an item a layer."""
    old_count_keys = [key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in model_config]
    old_count = model_config[old_count_keys[0]]
    result = dict(model_config)
    for key, value in model_config.items():
        if key in old_count_keys:
            result[key] = len(layers)
        elif isinstance(value, list) and len(value) == old_count and "layer" in key:
            result[key] = [value[layer] for layer in layers]
        elif key == "max_window_layers":
            result[key] = sum(layer < value for layer in layers)
    return result
