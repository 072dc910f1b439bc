"""The teacher's states in the shards: which are stored, and their columns for a batch (`annotation.store`).

Training computes a loss from the teacher's last hidden states, and the student starts from those that enter its lowest
layer that is not shared (:mod:`dskd.models.structure.trunk`). Both are the same in every epoch, run and seed, so
annotation, which computes them anyway, can store them. They are stored bit by bit in the type that models compute in,
so training reads the very numbers that it would compute.

Shapes: B sequences, T tokens, T' positions up to a sequence's last one with a target, D hidden.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dskd.artifacts.building import Building
from dskd.artifacts.disk_space import require_disk_space
from dskd.artifacts.files import make_folder
from dskd.config import TRUNK_IS_OFF, Config, StudentConfig, no_trunk_to_store
from dskd.console import gigabytes
from dskd.corpus.sequences import Sequences, TokenBatch
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.precision import resolve_precision
from dskd.models.structure.layers import recorded
from dskd.models.structure.trunk import TrunkError, require_same_shapes, trunk_depth
from dskd.shards.schema import (
    DTYPE_OF,
    LARGEST_SHARD,
    PRECISION_OF,
    SHARD_HEADER,
    STORED_AS,
    TEACHER_STATES,
    TRUNK_STATES,
    StoredStates,
    sample_bytes,
)
from dskd.students.spacing import chosen_layers


def plan_stored(config: Config, teacher: ModelFolder) -> StoredStates | None:
    """Returns what annotation stores of the teacher's states; None if `annotation.store` is empty.

    Raises:
        UserError: if the trunk's states are to be stored and there is no trunk, or a sample would be too large.
    """
    columns = config.annotation.store
    if not columns:
        return None
    depth = _depth(config, teacher) if TRUNK_STATES in columns else 0
    hidden_size = teacher.load_config().hidden_size
    stored = StoredStates(columns, DTYPE_OF[resolve_precision(config.precision)], hidden_size, depth)
    length, settings = config.corpus.sequence_length, config.annotation
    size = sample_bytes(length, kappa=settings.kappa, teacher_top_n=settings.teacher_top_n, stored=stored)
    if size > LARGEST_SHARD - SHARD_HEADER:
        raise UserError(
            f"annotation.store: with {' and '.join(columns)}, a sequence of {length:,} tokens has "
            f"{gigabytes(size)}, and a sample can have {gigabytes(LARGEST_SHARD)}; shorten "
            "corpus.sequence_length, or store less"
        )
    return stored


def _depth(config: Config, teacher: ModelFolder) -> int:
    """Returns the depth of the trunk that the config's student, as `dskd student` cuts it, shares with the teacher."""
    model_config = teacher.load_config()
    layers = chosen_layers(config, model_config.num_hidden_layers, teacher=teacher.digest)
    tied = bool(getattr(model_config, "tie_word_embeddings", False))
    return stored_trunk_depth(config.student, kept=layers, tied=tied, teacher=teacher)


def stored_trunk_depth(
    student: StudentConfig, *, kept: Sequence[int], tied: bool, teacher: ModelFolder | None = None
) -> int:
    """Returns the depth of the trunk whose states can be stored.

    Args:
        student: the student's section of the config.
        kept: the teacher's layers that the student keeps.
        tied: True if the output matrix and the embeddings are the same matrix.
        teacher: the teacher, whose layers are built to see whether they fit; None to leave this check out.

    Raises:
        UserError: if there is no shared trunk, with the reason.
    """
    try:
        depth = trunk_depth(student, kept=kept, same_teacher=True, tied=tied)
        if not depth:
            raise TrunkError(TRUNK_IS_OFF)
        if teacher is not None:
            require_same_shapes(teacher, depth)
    except TrunkError as problem:
        raise UserError(no_trunk_to_store(str(problem))) from None
    return depth


def stored_bytes(stored: StoredStates, sequences: Sequences, continuation_tokens: int) -> int:
    """Returns the most bytes that the states of these sequences take on disk."""
    lengths = np.minimum(sequences.lengths.astype(np.int64) + continuation_tokens, sequences.sequence_length)
    size = np.dtype(STORED_AS[stored.dtype].removeprefix("ndarray:")).itemsize
    return int(lengths.sum()) * stored.hidden_size * len(stored.columns) * size


def describe_stored(stored: StoredStates, size: int, folder: Path) -> str:
    """Returns a line about what annotation stores: `size` bytes in `folder`."""
    layer = f" (what enters layer {stored.trunk_depth})"
    names = [name + (layer if name == TRUNK_STATES else "") for name in stored.columns]
    return f"stores {' and '.join(names)} in {PRECISION_OF[stored.dtype]}: {gigabytes(size)} in {folder}"


def require_space(size: int, building: Building) -> None:
    """Checks that the disk has room for `size` bytes, of which an interrupted annotation may have written a part.

    Raises:
        UserError: if it has less; it names the folder and both sizes.
    """
    make_folder(building.folder.parent)
    written = sum(path.stat().st_size for path in building.folder.glob(".blocks/*/*.mds"))
    require_disk_space(
        building.folder.parent,
        size,
        "the states that annotation.store names",
        remedy="set workdir to another disk, or store less; older shards stay until the new ones are complete",
        already_written=written,
    )


def require_unchanged_input(teacher: FrozenModel, world: World) -> None:
    """Checks that the teacher's lowest layer takes the token embeddings as they are. All ranks must call this.

    Otherwise the student would change the stored states once more before its lowest layer.

    Raises:
        UserError: if the architecture changes them.
    """
    base: Any = teacher.decoder.base
    tokens = torch.arange(1, 9, device=world.device).view(1, -1) % teacher.vocab_size
    with recorded([base.get_input_embeddings(), teacher.decoder.layers[0]]) as runs:
        teacher.hidden_states(tokens)
    embeddings, lowest = runs
    if not torch.equal(embeddings.output, lowest.input):
        raise UserError(
            f"annotation.store: trunk_states: {type(base).__name__} changes the states that go into its lowest layer, "
            "so no student can start from stored ones; remove trunk_states from annotation.store",
            known_to_all_ranks=True,
        )


def columns_of_states(batch: TokenBatch, states: dict[str, torch.Tensor], dtype: str) -> dict[str, list[np.ndarray]]:
    """Returns {column: its values [T', D] for each sequence}: float32, or the raw bits of bf16 as uint16.

    Teacher states are 0 at positions without a target. A sequence without any target has one position.

    Args:
        batch: the sequences.
        states: {column: states [B, T, D], on any device}.
        dtype: the type that states must have, "bfloat16" or "float32".

    Raises:
        UserError: if they have another type.
    """
    positions = torch.arange(1, batch.has_target.shape[1] + 1)
    lengths = (positions * batch.has_target).amax(dim=1).clamp(min=1).tolist()
    columns = {}
    for name, values in states.items():
        if values.dtype != getattr(torch, dtype):
            raise UserError(
                f"annotation.store: this teacher's {name} are of type {str(values.dtype).removeprefix('torch.')}, and "
                f"the type to compute in is {dtype}, so they cannot be stored exactly; remove {name} from "
                "annotation.store, or set precision to fp32"
            )
        if name == TEACHER_STATES:
            values = values.masked_fill(~batch.has_target.to(values.device).unsqueeze(-1), 0)
        values = values.cpu()
        bits = values.numpy() if dtype == "float32" else values.view(torch.uint16).numpy()
        columns[name] = [bits[index, :length] for index, length in enumerate(lengths)]
    return columns
