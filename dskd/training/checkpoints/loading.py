"""Loading a checkpoint into the engine of a run, whatever number of ranks wrote it."""

import shutil

from dskd.console import say
from dskd.distributed.collectives import barrier, on_main
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.training.checkpoints.checkpoint import Checkpoint
from dskd.training.checkpoints.universal import make_universal, no_pickles, universal_folder
from dskd.training.models.pair import ModelPair


def needs_universal(checkpoint: Checkpoint | None, world: World) -> bool:
    """Returns True if another number of ranks wrote the checkpoint."""
    return checkpoint is not None and checkpoint.manifest.facts["world_size"] != world.world_size


def load_checkpoint(pair: ModelPair, checkpoint: Checkpoint, world: World) -> None:
    """Restores engine and optimizer to the state of the checkpoint, regardless of how many ranks wrote it.

    The engine must have been built with `load_universal` as :func:`needs_universal` returns it.

    Raises:
        UserError: if the checkpoint's student has a shared trunk of another depth, or DeepSpeed does not load it.
    """
    engine, then = pair.engine, checkpoint.manifest.facts.get("trunk_depth", 0)
    if then != pair.trunk_depth:
        raise UserError(
            f"{checkpoint.path}: written with a shared trunk of {then} layers, but the run has one of "
            f"{pair.trunk_depth} now; {_with_trunk_of(then, pair)}, or start from scratch with --overwrite",
            known_to_all_ranks=True,
        )
    path = checkpoint.path
    if needs_universal(checkpoint, world):
        written_by = checkpoint.manifest.facts["world_size"]
        say(f"  converting the checkpoint of {written_by} ranks into one for any number of ranks")
        on_main(lambda: make_universal(checkpoint.path))
        path = universal_folder(path)
    with no_pickles():
        loaded, _ = engine.load_checkpoint(
            str(path.parent),
            tag=path.name,
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
    if loaded is None:  # DeepSpeed only warns, and training would silently start from scratch
        raise UserError(
            f"{checkpoint.path}: DeepSpeed did not load this checkpoint; remove it, and the one before will be used"
        )
    if path != checkpoint.path:  # remove the universal form: the next checkpoint needs its space
        barrier()
        on_main(lambda: shutil.rmtree(path, ignore_errors=True))


def _with_trunk_of(depth: int, pair: ModelPair) -> str:
    """Returns what to set so that a run has a shared trunk of `depth` layers, which `pair` does not have."""
    if not depth:
        return "set student.shared_trunk to off"
    if pair.source.reads_trunk:  # the shards' trunk has another depth than a loaded teacher's
        return "set teacher.mode to zero3, so that a loaded teacher computes it"
    if pair.trunk is not None:
        return "set teacher.mode to auto, which reads it from the shards"
    return "set student.shared_trunk to on"
