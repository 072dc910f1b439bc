"""Checks that the student's layers above the shared trunk compute what the teacher's do.

The trunk is in :mod:`dskd.models.structure.trunk`. If its states are in the shards, no model is left to compute them
for other tokens. Training needs them for two kinds: those with which the layers above are compared, and those on which
exports are checked. So the student's lowest layers run on these before training, and are freed again
(:func:`run_trunk_once`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dskd.config import Config
from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.models.checks.agreement import probe_inputs
from dskd.models.files.folder import ModelFolder
from dskd.models.running.frozen import FrozenModel, load_frozen
from dskd.models.structure.layers import ModulePass, recorded

# Largest accepted difference of the lowest trained layer's output, relative to the norm of the layer's change to its
# input. The same weights and kernels give no difference at all; the tolerance is for kernels that round differently
# when the surrounding model has another shape.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class LayerRun(NamedTuple):
    """A run of the layer that the student's lowest layer is a copy of, and the positions of its tokens."""

    position_ids: torch.Tensor | None
    run: ModulePass


@dataclass(frozen=True)
class StoredTrunk:
    """A trunk whose states are in the shards, and what it computes for the tokens on which exports are checked."""

    depth: int
    probe: dict[str, Any]  # of :func:`dskd.models.checks.agreement.probe_inputs`
    probe_states: torch.Tensor  # [1, T, D], the states that enter layer `depth` for them


@torch.no_grad()
def run_trunk_once(folder: ModelFolder, config: Config, world: World, depth: int) -> tuple[StoredTrunk, list[LayerRun]]:
    """Runs the lowest `depth` + 1 layers of the student on test inputs, and frees them. All ranks must call it.

    Returns:
        The trunk, and the runs of layer `depth` for :func:`difference`.
    """
    model = load_frozen(folder, config, world, with_head=False, num_layers=depth + 1)
    expected = run_counterpart(model, depth, config, world)
    probe = probe_inputs(model.decoder.base, model.vocab_size, config.corpus.sequence_length, world.device)
    with recorded([model.decoder.layers[depth]]) as runs:
        model.hidden_states(**probe)
    trunk = StoredTrunk(depth, probe, runs[0].input)
    model.close()
    return trunk, expected


def run_counterpart(model: FrozenModel, twin: int, config: Config, world: World) -> list[LayerRun]:
    """Runs a model on short documents, and on a whole sequence, and returns the runs of its layer `twin`.

    At the end of a whole sequence rotary positions differ most, and some architectures use other factors. All ranks
    must call it.
    """
    # Two short rows, each of two documents if sequences are packed, and one sequence of full length.
    device, length = world.device, config.corpus.sequence_length
    short = torch.arange(1, 25, device=device).view(2, 12) * 7 % model.vocab_size
    packed = config.corpus.packing == "documents"
    start = torch.tensor([[*range(7), *range(5)], [*range(5), *range(7)]], device=device) if packed else None
    whole = torch.arange(1, length + 1, device=device).view(1, -1) * 7 % model.vocab_size
    expected = []
    for input_ids, positions in ((short, start), (whole, None)):
        with recorded([model.decoder.layers[twin]]) as runs:
            model.hidden_states(input_ids, positions)
        expected.append(LayerRun(positions, runs[0]))
    return expected


@torch.no_grad()
def difference(engine: Any, expected: list[LayerRun], *, world: World, dtype: torch.dtype) -> str | None:
    """Describes how the student's lowest layer differs from its twin; None if it does not. All ranks must call it.

    Feeds the states that entered the twin into the student, and compares the inputs and outputs of both layers.

    Args:
        engine: the student's engine, which still has the teacher's weights.
        expected: the runs of the twin, as :func:`run_counterpart` returns them.
        world: the ranks.
        dtype: type of the parameters.
    """
    differs = [0.0, 0.0]
    for positions, twin in expected:
        with recorded([engine.module.decoder.layers[0]]) as runs:
            engine(twin.input, positions)
        limit = _TOLERANCE[dtype] * float((twin.output - twin.input).float().norm())
        lowest = runs[0]
        for index, (theirs, ours) in enumerate(((twin.input, lowest.input), (twin.output, lowest.output))):
            # Written with `not … <=` so that a NaN counts as a difference.
            differs[index] += not float((theirs - ours).float().norm()) <= limit
    # All ranks must reach the same decision, even if their hardware rounds differently.
    changes_input, changes_output = sum_over_ranks(torch.tensor(differs, device=world.device)).tolist()
    name = type(engine.module.decoder.base).__name__
    if changes_input:
        return f"{name} changes the states that go into its lowest layer"
    return f"{name}'s lowest trained layer computes something different from the teacher's" if changes_output else None
