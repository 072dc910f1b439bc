"""Export of a checkpoint to an ordinary Hugging Face folder: the student's files with the trained tensors put in.

`AutoModelForCausalLM.from_pretrained` loads it without this package. The export is checked before it is published: it
is loaded that way, and its logits are compared with those of the student in training. Tensors are stored in the type of
the teacher: if that is bfloat16 or float16, tensors trained in float32 are rounded, and the effect on the logits is
measured and reported. A model card (:mod:`dskd.training.exporting.card`) and licences are added.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.hashing import as_json
from dskd.artifacts.manifest import Manifest, Recipe, is_current, package_versions, verify_files, write_json
from dskd.config import Config
from dskd.console import say, stage, warn
from dskd.errors import OutageError, UserError
from dskd.models.checks.agreement import check_agreement
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import TensorReader, write_weights
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.stored_names import StoredNames, parameter_names
from dskd.students.student import find_student, open_made_model
from dskd.tracking import forget_unlogged, log_export, note_unlogged, read_unlogged
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting import card
from dskd.training.exporting.card_facts import collect_facts, find_source_teacher
from dskd.training.exporting.files import add_licence_texts, copy_files, copy_licences


def recipe(source: checkpoint.Checkpoint) -> Recipe:
    """Returns the recipe of an export from this checkpoint."""
    manifest = source.manifest
    return Recipe(kinds.EXPORT.name, {"checkpoint": manifest.digest}, {}, manifest.teacher, manifest.tokenizer)


def build_export(config: Config) -> None:
    """Writes `WORKDIR/export/RUN` from the newest checkpoint of the config's run, unless it is up to date.

    In either case, sends to MLflow what it has not received about the export yet.

    Raises:
        UserError: if there is no checkpoint, or the export's logits differ from those of the student in training.
        OutageError: if training removes the checkpoint meanwhile.
    """
    source = checkpoint.latest(config)
    if source is None:
        raise UserError(
            f"{kinds.checkpoint_folder(config)}: there is no checkpoint; train with `{kinds.CHECKPOINT.made_by}`"
        )
    student = find_student(config)
    if student.digest != source.manifest.inputs["student"]:
        raise UserError(
            f"{source.path}: trained from another student ({source.manifest.inputs['student'][:12]}…) than "
            f"{student.path} ({student.digest[:12]}…); train again with `{kinds.CHECKPOINT.made_by}`"
        )
    target = config.path(kinds.EXPORT.folder, config.run)
    if is_current(target, recipe(source)):
        say(f"up to date: {target}")
    else:
        try:
            _build(config, source, student, target)
        except FileNotFoundError as error:
            if source.path.exists():
                raise
            raise OutageError(
                f"{source.path}: training replaced this checkpoint during the export; export again"
            ) from error
    run_id = source.manifest.facts["mlflow_run_id"]
    if run_id and config.tracking.enabled:
        log_export(config, config.run, run_id, target)
    forget_unlogged(target)


def is_exported(config: Config, source: checkpoint.Checkpoint) -> bool:
    """Returns True if the run's export is of this checkpoint and, if the run is tracked, MLflow has received it."""
    target = config.path(kinds.EXPORT.folder, config.run)
    is_left = config.tracking.enabled and read_unlogged(target) is not None
    return is_current(target, recipe(source)) and not is_left


def _build(config: Config, source: checkpoint.Checkpoint, student: ModelFolder, target: Path) -> None:
    with stage(f"export: run {config.run!r}", reads=[student.path, source.path], writes=target):
        verify_files(source.path, source.manifest)
        teacher = find_source_teacher(config, source)
        with build_artifact(target, recipe(source)) as building:
            trained = load_file(source.path / checkpoint.TRAINED_FILE)
            types = write_export(student, trained, building.folder)
            agreement = check_agreement(
                building.folder,
                load_file(source.path / checkpoint.PROBE_FILE),
                trained,
                getattr(torch, source.manifest.facts["dtype"]),
                student.trust_remote_code,
                trained=trained,
                remedy="nothing was published. Train again, or report this with the manifest of the checkpoint",
            )
            building.facts.update(
                step=source.step,
                mlflow_run_id=source.manifest.facts["mlflow_run_id"],
                run=config.run,
                logits_error=agreement.error,
                rounding_error=agreement.rounding,
                **{card.FACTS: collect_facts(config, source, student, teacher)},
            )
            copy_licences(student, teacher, building.folder)
            add_licence_texts(building.facts[card.FACTS], building.folder)
            text = card.render_card(as_json(building.facts), package_versions())
            card.write_card(building.folder, text)
            if config.tracking.enabled and config.tracking.log_model:
                note_unlogged(target, {})
        say(
            f"  step {source.step}; reloaded, its logits differ from the trained student's by {agreement.error:.1e} "
            "(relative)"
        )
        if agreement.rounding:
            stored = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
            say(
                f"  trained tensors are rounded to {stored}, in which the student is stored: this changes logits by "
                f"{agreement.rounding:.1e} (relative)"
            )


def find_export(config: Config, run: str) -> tuple[ModelFolder, Manifest]:
    """Returns the exported model of a run, and its manifest.

    Raises:
        UserError: if it is missing or damaged.
    """
    return open_made_model(config, config.path(kinds.EXPORT.folder, run), kinds.EXPORT.name)


def write_export(student: ModelFolder, trained: Mapping[str, torch.Tensor], target: Path) -> set[torch.dtype]:
    """Writes the student's folder with the trained tensors put in, in the type in which the student stores them.

    If a trained value is too large for its type (float16), where it would become infinite, all trained and all float16
    tensors are stored in float32.

    Args:
        student: the model that was trained.
        trained: {name in the folder: tensor}.
        target: an empty folder.

    Returns:
        The types in which the trained tensors are stored.

    Raises:
        UserError: if the student has no tensor of one of these names.
    """
    reader = TensorReader(student.path)
    if unknown := sorted(set(trained) - set(reader.names)):
        raise UserError(f"{student.path}: the student has no tensor {', '.join(unknown)}")
    replaced = {name: tensor.to(reader.read(name).dtype) for name, tensor in trained.items()}
    copy_files(student, target)
    too_large = [name for name, tensor in replaced.items() if tensor.isinf().any() and not trained[name].isinf().any()]
    if too_large:
        warn(
            f"{', '.join(too_large)}: trained values that {replaced[too_large[0]].dtype} cannot hold; stored in float32"
        )
        reader = _InFloat32(student.path)
        replaced = {name: tensor.float() for name, tensor in trained.items()}
        model_config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        named = {key: "float32" for key in ("torch_dtype", "dtype") if key in model_config}
        write_json(target / "config.json", model_config | named)
    stale = _other_names(student, trained)
    write_weights(target, reader, {name: name for name in reader.names if name not in stale}, replaced)
    return {tensor.dtype for tensor in replaced.values()}


class _InFloat32(TensorReader):
    """A reader of a folder's tensors that widens float16 to float32."""

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        return tensor.float() if tensor.dtype == torch.float16 else tensor


def _other_names(student: ModelFolder, trained: Mapping[str, torch.Tensor]) -> set[str]:
    """Returns the names of stored duplicates of trained tensors: a folder may store both of two tied matrices."""
    model = empty_model(student)
    names = StoredNames(model, TensorReader(student.path))
    stale: set[str] = set()
    for _, aliases in parameter_names(model):
        stored = {name for alias in aliases if (name := names.find(alias)) is not None}
        if stored & set(trained):
            stale |= stored - set(trained)
    return stale
