"""Checkpoints: `WORKDIR/checkpoints/RUN/step-NNNNNNNN/`, written beside the older ones and renamed when whole.

A checkpoint holds DeepSpeed's own files, from which training goes on; `trained.safetensors`, the parameters that are
trained in full precision under their Hugging Face names, from which :mod:`dskd.export` makes a model; and
`probe.safetensors`, logits of the student in training on a few tokens, against which the export is checked. Parameters
that are not trained are in none of them: they are those of the student's folder.

The data order, the drawn positions and the learning rate are functions of seed and step, so the step is all the state
that loader, generators and schedule have.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dskd.config import Config
from dskd.config_file import differences
from dskd.console import warn
from dskd.distributed import World, barrier, on_main
from dskd.errors import UserError, listed
from dskd.manifest import Building, Manifest, Recipe, is_current, read_manifest, verify_files

FOLDER = "checkpoints"
MADE_BY = "deepspeed launcher/train.py --config FILE"
TRAINED_FILE, PROBE_FILE = "trained.safetensors", "probe.safetensors"
PROBE_TOKENS = 16
_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    manifest: Manifest

    @property
    def is_final(self) -> bool:
        """True when the run has no steps left."""
        return self.step == self.manifest.facts["total_steps"]


def folder(config: Config) -> Path:
    """Where the checkpoints of the config's run are."""
    return config.path(FOLDER, config.run)


def latest(config: Config) -> Checkpoint | None:
    """The newest whole checkpoint of the run; damaged ones are passed over, saying so."""
    for step, path in sorted(_steps(folder(config)), reverse=True):
        try:
            return Checkpoint(path, step, read_manifest(path, "checkpoint", made_by=MADE_BY))
        except UserError as problem:
            warn(f"{problem}; passing over this checkpoint")
    return None


def at_step(config: Config, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        UserError: when it is missing or damaged.
    """
    path = folder(config) / f"step-{step:08d}"
    return Checkpoint(path, step, read_manifest(path, "checkpoint", made_by=MADE_BY))


def is_finished(config: Config, recipe: Recipe) -> bool:
    """True when the run was trained to its end with this very recipe."""
    newest = latest(config)
    return newest is not None and newest.is_final and is_current(newest.path, recipe)


def changes_since(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """In what the run of a checkpoint was another one than `recipe` describes; empty when it is the same."""
    found = checkpoint.manifest
    changes = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(found.config, recipe.config)]
    changes += [
        f"{name}: another one then ({found.inputs.get(name, 'none')[:12]}…, now {digest[:12]}…)"
        for name, digest in recipe.inputs.items()
        if found.inputs.get(name) != digest
    ]
    return changes


def require_same_run(checkpoint: Checkpoint, recipe: Recipe, config: Config) -> None:
    """Refuses to go on from a checkpoint of another configuration.

    Raises:
        UserError: with every difference.
    """
    changes = changes_since(checkpoint, recipe)
    if changes:
        raise UserError(
            listed(
                f"{checkpoint.path}: this checkpoint is of another run than {config.run!r} is now; put the "
                "config back, name another run, or start anew with --overwrite",
                changes,
            )
        )


def save(
    engine: Any,
    student_logits: Callable[[torch.Tensor], torch.Tensor],
    config: Config,
    recipe: Recipe,
    facts: dict[str, Any],
    world: World,
) -> None:
    """Writes the checkpoint of `facts["step"]`, then removes what it replaces. All ranks call it.

    Args:
        engine: the student's.
        student_logits: logits [B, T, V] of token ids [B, T].
        config: the experiment.
        recipe: of the run.
        facts: for the manifest.
        world: the ranks.

    Raises:
        UserError: when the student's weights are not finite; nothing is removed then.
    """
    base = folder(config)
    building = Building(base / f"step-{facts['step']:08d}", recipe, facts)
    on_main(building.clear)
    engine.save_checkpoint(str(base), tag=building.folder.name, save_latest=False, exclude_frozen_parameters=True)
    _save_trained(engine, building.folder / TRAINED_FILE, world)
    _save_probe(engine, student_logits, building.folder / PROBE_FILE, world)
    barrier()
    on_main(lambda: _publish(building, config.train.keep_last))


def load(engine: Any, checkpoint: Checkpoint, world: World, *, trunk_depth: int) -> None:
    """Puts engine and optimizer into the state of the checkpoint.

    Raises:
        UserError: when its files were changed, or it was written by another number of ranks, or by a student with
            another shared trunk.
    """
    on_main(lambda: verify_files(checkpoint.path, checkpoint.manifest, made_by=MADE_BY))
    writers = checkpoint.manifest.facts["world_size"]
    if writers != world.world_size:
        raise UserError(
            f"{checkpoint.path}: written by {writers} ranks, and there are {world.world_size} now; start {writers} "
            "ranks, or start anew with --overwrite",
            known_to_all_ranks=True,
        )
    then = checkpoint.manifest.facts.get("trunk_depth", 0)
    if then != trunk_depth:
        raise UserError(
            f"{checkpoint.path}: written with a shared trunk of {then} layers, and it has {trunk_depth} now; set "
            f"student.shared_trunk to {'on' if then else 'off'}, or start anew with --overwrite",
            known_to_all_ranks=True,
        )
    with _no_pickles():
        loaded, _ = engine.load_checkpoint(
            str(checkpoint.path.parent),
            tag=checkpoint.path.name,
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
    if loaded is None:  # DeepSpeed says so with a warning only, and training would begin anew in silence
        raise UserError(
            f"{checkpoint.path}: DeepSpeed did not load this checkpoint; remove it, and the one before is used"
        )


def _publish(building: Building, keep_last: int) -> None:
    # DeepSpeed puts scripts beside its files that load them as pickles; ours are read by `dskd export`.
    for script in building.path.parent.glob("zero_to_*.py"):
        script.unlink()
    _require_finite(building)
    building.publish()
    # Only now that there is a new one do older ones go: those of a run that is overwritten, and those beyond keep_last.
    step = building.facts["step"]
    steps = sorted(_steps(building.path.parent))
    others = [path for number, path in steps if number > step or not is_current(path, building.recipe)]
    kept = [path for _, path in steps if path not in others]
    for path in [*others, *kept[:-keep_last]]:
        shutil.rmtree(path)
    # The run is this process's own: whatever still has a hidden name was left by one that was killed.
    for path in building.path.parent.glob(".step-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _require_finite(building: Building) -> None:
    for file in (TRAINED_FILE, PROBE_FILE):
        for name, tensor in load_file(building.folder / file).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                shutil.rmtree(building.folder)
                building.release()
                raise UserError(
                    f"step {building.facts['step']}: {name} of the student is not finite; the run stops, and no "
                    "checkpoint of this step is written. Lower train.learning_rate, or use precision: fp32"
                )


def _steps(base: Path) -> Iterator[tuple[int, Path]]:
    if base.is_dir():
        for path in base.iterdir():
            name = _STEP_FOLDER.match(path.name)
            if name:
                yield int(name.group(1)), path


def _save_trained(engine: Any, path: Path, world: World) -> None:
    """The trained parameters in full precision by their Hugging Face names; gathered one at a time, kept by rank 0."""
    from deepspeed.utils import safe_get_full_fp32_param

    names = engine.module.hub_names
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            if world.is_main:
                tensors[names[name]] = full.detach().cpu().clone()
    if world.is_main:
        save_file(tensors, path, metadata={"format": "pt"})


def _save_probe(engine: Any, student_logits: Callable[[torch.Tensor], torch.Tensor], path: Path, world: World) -> None:
    """Logits of the student as it is in training, on the first tokens of the vocabulary."""
    vocab_size = engine.module.head.weight.ds_shape[0]
    input_ids = torch.arange(PROBE_TOKENS, device=world.device).unsqueeze(0) * 7 % vocab_size
    logits = student_logits(input_ids)
    if world.is_main:
        save_file({"input_ids": input_ids.cpu(), "logits": logits.float().cpu().contiguous()}, path)


@contextlib.contextmanager
def _no_pickles() -> Iterator[None]:
    """Makes torch.load refuse anything but tensors and plain values, also where DeepSpeed asks for more."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(_classes_in_checkpoints()):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _classes_in_checkpoints() -> list[Any]:
    """The classes of DeepSpeed's that its files name beside tensors and plain values; none runs code when loaded."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
