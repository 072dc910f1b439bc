"""Checkpoints: `WORKDIR/checkpoints/RUN/step-NNNNNNNN/`, written beside the older ones and renamed when whole; then the
file `latest`, as DeepSpeed calls it, is replaced by one that names the new one, and only then do older ones go.

A checkpoint holds DeepSpeed's own files, from which training goes on; `trained.safetensors`, the parameters that are
trained in full precision under their Hugging Face names, from which :mod:`dskd.export` makes a model; and
`probe.safetensors`, logits of the student in training on a few tokens, against which the export is checked. Parameters
that are not trained are in none of them: they are those of the student's folder.

The data order, the drawn positions and the learning rate are functions of seed and step, so the step is all the state
that loader, generators and schedule have.

Training waits until a checkpoint is written. DeepSpeed's decoupled engine (0.19.8) takes ZeRO-3, but waits for the
files before the optimizer's next step: it hides less than one step, and what needs them whole (hashes, the name, the
removal of older ones) would have to come after that. Besides, it makes `spawn` the start method of the loader's workers
too, moves what lies in host memory to /dev/shm, and returns as if it had saved when its writer is dead.
"""

import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dskd.agreement import PROBE_TOKENS, probe_inputs
from dskd.config import Config, TrainConfig
from dskd.config_file import differences
from dskd.console import say, warn
from dskd.distributed import World, barrier, on_main
from dskd.elastic import make_universal, no_pickles, universal_folder
from dskd.errors import UserError, listed
from dskd.folders import full_disk_is_said, make_folder, remove_tree, write_text
from dskd.manifest import Building, Manifest, Recipe, is_current, read_manifest, verify_files

FOLDER = "checkpoints"
MADE_BY = "deepspeed launcher/train.py --config FILE"
LATEST_FILE = "latest"
TRAINED_FILE, PROBE_FILE = "trained.safetensors", "probe.safetensors"
REHEARSAL = ".rehearsal"  # where the untouched student is exported to before the first step
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


def lock_path(config: Config, run: str) -> Path:
    """The lock of the one process that may train a run."""
    return config.path(FOLDER, f".{run}.lock")


def latest(config: Config, *, verify: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint of the run, or None; damaged ones are passed over, saying so.

    Args:
        config: the experiment, with the run's keys laid over it.
        verify: read every file and compare it with the manifest, instead of its size alone.

    Raises:
        UserError: when there are checkpoints and all of them are damaged.
    """
    base = folder(config)
    while True:
        named = _read_latest(base)
        found, problems, damaged = _newest_whole(base, named, verify=verify)
        # Training may have published the next one meanwhile, and removed what was looked at here.
        if (found is not None and not problems) or _read_latest(base) == named:
            break
    for problem in problems:
        warn(problem)
    if found is None and damaged:
        remedy = "restore one, or start from scratch with --overwrite"
        raise UserError(listed(f"{base}: none of the checkpoints is whole; {remedy}", damaged))
    return found


def _newest_whole(base: Path, named: str | None, *, verify: bool) -> tuple[Checkpoint | None, list[str], list[str]]:
    """The newest whole checkpoint as far as the one that `latest` names; what is wrong with that file and with those
    that were passed over; and the latter alone.
    """
    problems, damaged = [], []
    step_named = _STEP_FOLDER.match(named) if named is not None else None
    newest = int(step_named[1]) if step_named else None
    if named is not None and newest is None:
        problems.append(f"{base / LATEST_FILE}: it names no checkpoint; looking for the newest whole one")
    steps = sorted(_steps(base), reverse=True)
    if newest is not None and newest not in dict(steps):
        problems.append(f"{base / LATEST_FILE}: it names step {newest}, which is not there; looking for the one before")
    for step, path in steps:
        # A later one was not published yet, or is of a run that is being overwritten.
        if newest is not None and step > newest:
            continue
        try:
            manifest = read_manifest(path, "checkpoint", made_by=MADE_BY)
            _require_facts(path, manifest)
            if verify:
                verify_files(path, manifest, made_by=MADE_BY)
        except (UserError, FileNotFoundError) as problem:  # a file that goes while it is read
            damaged.append(str(problem))
            problems.append(f"{problem}; passing over this checkpoint")
            continue
        return Checkpoint(path, step, manifest), problems, damaged
    return None, problems, damaged


def _require_facts(path: Path, manifest: Manifest) -> None:
    missing = [name for name in ("total_steps", "world_size") if not isinstance(manifest.facts.get(name), int)]
    if missing:
        raise UserError(f"{path}: its manifest does not say {' and '.join(missing)}")


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
        then, now = (found.get("precision") for found in (checkpoint.manifest.config, recipe.config))
        machine = ""
        if config.precision == "auto" and then != now:
            machine = f". precision: auto is {now} on this machine; set it to {then} to continue as before"
        raise UserError(
            listed(
                f"{checkpoint.path}: this checkpoint is of another run than {config.run!r} is now; put the "
                f"config back, name another run, or start from scratch with --overwrite{machine}",
                changes,
            )
        )


def save(
    engine: Any,
    student_logits: Callable[..., torch.Tensor],
    config: Config,
    recipe: Recipe,
    facts: dict[str, Any],
    world: World,
) -> None:
    """Writes the checkpoint of `facts["step"]`, then removes what it replaces. All ranks call it.

    Args:
        engine: the student's.
        student_logits: logits [1, T, V] of what :func:`dskd.agreement.probe_inputs` returns.
        config: the experiment.
        recipe: of the run.
        facts: for the manifest.
        world: the ranks.

    Raises:
        UserError: when there is no space, or the student's weights are not finite; nothing is removed then.
    """
    base = folder(config)
    require_space(engine, config)
    building = Building(base / f"step-{facts['step']:08d}", recipe, facts)
    on_main(building.clear)
    with full_disk_is_said(base):
        engine.save_checkpoint(str(base), tag=building.folder.name, save_latest=False, exclude_frozen_parameters=True)
        _save_trained(engine, building.folder / TRAINED_FILE, world)
        _save_probe(engine, student_logits, config, building.folder / PROBE_FILE, world)
    barrier()
    on_main(lambda: _publish(building, config.train))


def remove_leftovers(base: Path) -> None:
    """Removes what a killed process left under hidden names, which would take the room of the next checkpoint.

    The caller holds the lock of the run, so nothing there belongs to a process that lives.
    """
    for path in (*base.glob(".step-*"), base / REHEARSAL):
        remove_tree(path)


def require_space(engine: Any, config: Config) -> None:
    """Refuses to begin what the disk cannot take. All ranks call it.

    Raises:
        UserError: when there is less space than a checkpoint needs.
    """
    needed, base = required_bytes(engine), folder(config)

    def check() -> None:
        make_folder(base)
        free = shutil.disk_usage(base).free
        if free < needed:
            raise UserError(
                f"{base}: a checkpoint takes {needed / 1e9:.2f} GB, and there are {free / 1e9:.2f} GB free; what was "
                "complete stays. Free some, or set workdir to another disk, and continue with --resume"
            )

    on_main(check)


def required_bytes(engine: Any) -> int:
    """What a checkpoint takes: the trained parameters and AdamW's two moments in float32, by DeepSpeed; the parameters
    again, for export; the probe's logits; and little things.
    """
    module = engine.module
    trained = [parameter.ds_numel for parameter in module.parameters() if parameter.requires_grad]
    probe = PROBE_TOKENS * module.head.weight.ds_shape[0]
    return 16 * sum(trained) + 4 * probe + engine.world_size * (2**16 + 2**12 * len(trained))


def needs_universal(checkpoint: Checkpoint | None, world: World) -> bool:
    """True when the checkpoint was written by another number of ranks."""
    return checkpoint is not None and checkpoint.manifest.facts["world_size"] != world.world_size


def load(engine: Any, checkpoint: Checkpoint, world: World, *, trunk_depth: int) -> None:
    """Puts engine and optimizer into the state of the checkpoint, whatever number of ranks wrote it.

    The engine must have been made for :func:`needs_universal`.

    Raises:
        UserError: when it was written by a student with another shared trunk, or DeepSpeed does not take it.
    """
    then = checkpoint.manifest.facts.get("trunk_depth", 0)
    if then != trunk_depth:
        raise UserError(
            f"{checkpoint.path}: written with a shared trunk of {then} layers, and it has {trunk_depth} now; set "
            f"student.shared_trunk to {'on' if then else 'off'}, or start from scratch with --overwrite",
            known_to_all_ranks=True,
        )
    path = checkpoint.path
    if needs_universal(checkpoint, world):
        say(f"  written by {checkpoint.manifest.facts['world_size']} ranks: it is made into one for any number of them")
        on_main(lambda: make_universal(checkpoint.path))
        path = universal_folder(path)
    with no_pickles():
        loaded, _ = engine.load_checkpoint(
            str(path.parent),
            tag=path.name,
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
    if loaded is None:  # DeepSpeed says so with a warning only, and training would begin from scratch in silence
        raise UserError(
            f"{checkpoint.path}: DeepSpeed did not load this checkpoint; remove it, and the one before is used"
        )
    if path != checkpoint.path:  # the next checkpoint needs its room
        barrier()
        on_main(lambda: shutil.rmtree(path, ignore_errors=True))


def _publish(building: Building, train: TrainConfig) -> None:
    base, step = building.path.parent, building.facts["step"]
    # DeepSpeed puts scripts beside its files that load them as pickles; ours are read by `dskd export`.
    for script in base.glob("zero_to_*.py"):
        script.unlink()
    _require_finite(building)
    building.publish()
    write_text(base / LATEST_FILE, f"{building.path.name}\n")
    # Only now that there is a new one do older ones go: those of a run that is overwritten, and those not to be kept.
    steps = sorted(_steps(base))
    others = [path for number, path in steps if number > step or not is_current(path, building.recipe)]
    own = [(number, path) for number, path in steps if path not in others]
    old = [path for number, path in own[: -train.keep_last] if not train.keep_every or number % train.keep_every]
    for path in [*others, *old]:
        # No folder with some of its files gone, and no end of the run where one cannot go: on NFS a file that another
        # process has open stays, under a name of its own.
        path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex}"))
    remove_leftovers(base)


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


def _save_probe(
    engine: Any, student_logits: Callable[..., torch.Tensor], config: Config, path: Path, world: World
) -> None:
    """Logits of the student as it is in training, on the tokens that the export is compared on."""
    module = engine.module
    inputs = probe_inputs(
        module.decoder.base, module.head.weight.ds_shape[0], config.corpus.sequence_length, world.device
    )
    logits = student_logits(**inputs)
    if world.is_main:
        tensors = {name: tensor.cpu() for name, tensor in inputs.items()}
        save_file({**tensors, "logits": logits.float().cpu().contiguous()}, path)


def _read_latest(base: Path) -> str | None:
    """What stands in the file `latest`; None where there is none."""
    try:
        return (base / LATEST_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""
