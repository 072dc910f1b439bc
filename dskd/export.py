"""A checkpoint becomes an ordinary Hugging Face folder: the student's files with the trained tensors put in.

`AutoModelForCausalLM.from_pretrained` loads it with nothing of this package. The export is checked before it is
published: it is loaded that way, and its logits are compared with those that the student gave in training.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from dskd import checkpoint
from dskd.config import Config
from dskd.console import say, stage
from dskd.errors import OutageError, UserError
from dskd.manifest import MANIFEST_NAME, Manifest, Recipe, build_artifact, is_current, read_manifest, verify_files
from dskd.model_folder import WEIGHTS_INDEX, ModelFolder, TensorReader, load_tokenizer, tokenizer_digest
from dskd.student import find_student, write_weights
from dskd.tracking import log_export

FOLDER = "export"
MADE_BY = "dskd export --config FILE"


def recipe(found: checkpoint.Checkpoint) -> Recipe:
    """What decides an export."""
    manifest = found.manifest
    return Recipe("export", {"checkpoint": manifest.digest}, {}, manifest.teacher, manifest.tokenizer)


def build_export(config: Config) -> None:
    """Writes `WORKDIR/export/RUN` from the newest checkpoint of the config's run, where it is not up to date.

    MLflow is told in either case: what it was not told before is sent now.

    Raises:
        UserError: when there is no checkpoint, or the export does not compute what the student did in training; an
            OutageError when the checkpoint goes meanwhile.
    """
    found = checkpoint.latest(config)
    if found is None:
        raise UserError(f"{checkpoint.folder(config)}: there is no checkpoint; train with `{checkpoint.MADE_BY}`")
    student = find_student(config)
    if student.digest != found.manifest.inputs["student"]:
        raise UserError(
            f"{found.path}: trained from another student ({found.manifest.inputs['student'][:12]}…) than "
            f"{student.path} ({student.digest[:12]}…); train again with `{checkpoint.MADE_BY}`"
        )
    target = config.path(FOLDER, config.run)
    if is_current(target, recipe(found)):
        say(f"up to date: {target}")
    else:
        try:
            _build(config, found, student, target)
        except FileNotFoundError as error:
            if found.path.exists():
                raise
            raise OutageError(
                f"{found.path}: training has replaced this checkpoint while it was exported; export again"
            ) from error
    run_id = found.manifest.facts["mlflow_run_id"]
    if run_id and config.tracking.enabled:
        log_export(config, config.run, run_id, target)


def _build(config: Config, found: checkpoint.Checkpoint, student: ModelFolder, target: Path) -> None:
    with stage(f"export: run {config.run!r}", reads=[student.path, found.path], writes=target):
        verify_files(found.path, found.manifest, made_by=checkpoint.MADE_BY)
        with build_artifact(target, recipe(found)) as building:
            _write(student.path, found.path / checkpoint.TRAINED_FILE, building.folder)
            dtype = getattr(torch, found.manifest.facts["dtype"])
            error = check(building.folder, found.path / checkpoint.PROBE_FILE, dtype, config.teacher.trust_remote_code)
            building.facts.update(
                step=found.step, mlflow_run_id=found.manifest.facts["mlflow_run_id"], run=config.run, logits_error=error
            )
        say(f"  step {found.step}; reloaded, its logits differ from the trained student's by {error:.1e} (relative)")


def find_export(config: Config, run: str) -> tuple[ModelFolder, Manifest]:
    """The exported model of a run, and its manifest.

    Raises:
        UserError: when it is missing or damaged.
    """
    folder = config.path(FOLDER, run)
    manifest = read_manifest(folder, "export", made_by=MADE_BY)
    digest = tokenizer_digest(load_tokenizer(folder))
    return ModelFolder(folder, manifest.digest, digest, config.teacher.trust_remote_code), manifest


def check(folder: Path, probe: Path, dtype: torch.dtype, trust_remote_code: bool) -> float:
    """Loads the folder as any user would and compares its logits with the probe's.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        UserError: when it is more than rounding in `dtype` explains.
    """
    from transformers import AutoModelForCausalLM

    expected = load_file(probe)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    error = float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max())
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise UserError(
            f"{folder}: the exported model's logits differ from the trained student's by {error:.1e} (relative), more "
            f"than {tolerance:.0e}; nothing was published. Train again, or report this with the manifest of the "
            "checkpoint"
        )
    return error


def _write(student: Path, trained_file: Path, target: Path) -> None:
    for file in student.iterdir():
        if file.suffix != ".safetensors" and file.name not in (WEIGHTS_INDEX, MANIFEST_NAME):
            shutil.copyfile(file, target / file.name)
    reader = TensorReader(student)
    trained = load_file(trained_file)
    unknown = sorted(set(trained) - set(reader.names))
    if unknown:
        raise UserError(f"{trained_file}: the student has no tensor {', '.join(unknown)}")
    replaced = {name: tensor.to(reader.read(name).dtype) for name, tensor in trained.items()}
    write_weights(target, reader, {name: name for name in reader.names}, replaced)
