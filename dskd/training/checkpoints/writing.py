"""Writing checkpoints.

A new checkpoint is written under a hidden name and renamed when it is complete. Then the file `latest` (DeepSpeed's
name) is replaced to point to it, and only after that are older checkpoints removed.

Training waits until a checkpoint is written. DeepSpeed's decoupled engine (0.19.8) supports ZeRO-3, but waits for the
files before the optimizer's next step. It therefore hides less than one step, and everything that needs complete files
(hashes, the rename, removing older checkpoints) would have to come after that. It also makes `spawn` the start method
of the loader's workers, moves data in host memory to /dev/shm, and reports success when its writer has died.
"""

import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dskd.artifacts.building import Building
from dskd.artifacts.disk_space import report_full_disk, require_disk_space
from dskd.artifacts.files import make_folder, remove_tree, write_text
from dskd.artifacts.kinds import checkpoint_folder
from dskd.artifacts.manifest import Recipe, is_current
from dskd.config import Config, TrainConfig
from dskd.distributed.collectives import barrier, on_main
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.checks.agreement import PROBE_TOKENS
from dskd.training.checkpoints.checkpoint import LATEST_FILE, PROBE_FILE, REHEARSAL, TRAINED_FILE, steps_on_disk
from dskd.training.models.pair import ModelPair
from dskd.training.models.student import MASTER_BYTES, MOMENT_BYTES

# Bytes of a checkpoint for each trained element: DeepSpeed's parameters and AdamW's two moments in float32, and the
# parameter once more for export, also in float32.
EXPORTED_BYTES = 4
ELEMENT_BYTES = MASTER_BYTES + MOMENT_BYTES + EXPORTED_BYTES


def save_checkpoint(
    pair: ModelPair,
    config: Config,
    recipe: Recipe,
    facts: dict[str, Any],
    world: World,
) -> None:
    """Writes the checkpoint of `facts["step"]`, then removes the checkpoints it replaces. All ranks call it.

    Args:
        pair: the models in training.
        config: the experiment.
        recipe: the run's recipe.
        facts: facts for the manifest.
        world: the ranks.

    Raises:
        UserError: if there is no space, or the student's weights are not finite; older checkpoints then stay.
    """
    base, engine = checkpoint_folder(config), pair.engine
    require_space(engine, config)
    building = Building(base / f"step-{facts['step']:08d}", recipe, facts)
    on_main(building.clear)
    with report_full_disk(base):
        engine.save_checkpoint(str(base), tag=building.folder.name, save_latest=False, exclude_frozen_parameters=True)
        _save_trained(engine, building.folder / TRAINED_FILE, world)
        _save_probe(pair, config, building.folder / PROBE_FILE, world)
    barrier()
    on_main(lambda: _publish(building, config.train))


def remove_leftovers(base: Path) -> None:
    """Removes files that a killed process left under hidden names: they take space that the next checkpoint needs.

    The caller holds the lock of the run, so none of them belongs to a live process.
    """
    for path in (*base.glob(".step-*"), base / REHEARSAL):
        remove_tree(path)


def require_space(engine: Any, config: Config) -> None:
    """Checks that the disk has room for a checkpoint. All ranks call it.

    Raises:
        UserError: if there is less free space than a checkpoint needs.
    """
    needed, base = required_bytes(engine), checkpoint_folder(config)

    def check() -> None:
        make_folder(base)
        require_disk_space(
            base,
            needed,
            "a checkpoint",
            remedy="set workdir to another disk, and continue with --resume; complete checkpoints stay",
        )

    on_main(check)


def required_bytes(engine: Any) -> int:
    """Returns the bytes of a checkpoint: its tensors, and an allowance for headers and small files."""
    module = engine.module
    trained = [parameter.ds_numel for parameter in module.parameters() if parameter.requires_grad]
    probe = PROBE_TOKENS * module.head.weight.ds_shape[0]
    return ELEMENT_BYTES * sum(trained) + 4 * probe + engine.world_size * (2**16 + 2**12 * len(trained))


def _publish(building: Building, train: TrainConfig) -> None:
    base, step = building.path.parent, building.facts["step"]
    # DeepSpeed adds scripts that load its files as pickles. They are not needed: `dskd export` reads our own files.
    for script in base.glob("zero_to_*.py"):
        script.unlink()
    _require_finite(building)
    building.publish()
    write_text(base / LATEST_FILE, f"{building.path.name}\n")
    # Now that the new checkpoint is published, remove those of an overwritten run and those past the limits of
    # `keep_last` and `keep_every`.
    steps = sorted(steps_on_disk(base))
    others = [path for number, path in steps if number > step or not is_current(path, building.recipe)]
    own = [(number, path) for number, path in steps if path not in others]
    old = [path for number, path in own[: -train.keep_last] if not train.keep_every or number % train.keep_every]
    for path in [*others, *old]:
        # Rename first, so that no visible checkpoint ever lacks some of its files, and so that a file that cannot be
        # removed does not end the run: NFS keeps a file that another process has open, under another name.
        path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex}"))
    remove_leftovers(base)


def _require_finite(building: Building) -> None:
    for file in (TRAINED_FILE, PROBE_FILE):
        for name, tensor in load_file(building.folder / file).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                shutil.rmtree(building.folder)
                building.release()
                raise UserError(
                    f"step {building.facts['step']}: {name} of the student is not finite; the run stops without a "
                    "checkpoint of this step. Lower train.learning_rate, or use precision: fp32"
                )


def _save_trained(engine: Any, path: Path, world: World) -> None:
    """Writes the trained parameters in full precision under their Hugging Face names.

    Gathers them one at a time; only rank 0 keeps and writes them.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    tensors = {}
    for name, parameter in engine.module.exported_parameters():
        full = safe_get_full_fp32_param(parameter)
        if world.is_main:
            tensors[name] = full.detach().cpu().clone()
    if world.is_main:
        save_file(tensors, path, metadata={"format": "pt"})


def _save_probe(pair: ModelPair, config: Config, path: Path, world: World) -> None:
    """Writes the logits of the student in training on the tokens used to check the export."""
    probe = pair.probe(config, world)
    if world.is_main:
        tensors = {name: tensor.cpu() for name, tensor in probe.items()}
        save_file({**tensors, "logits": tensors["logits"].float().contiguous()}, path)
