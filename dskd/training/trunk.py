"""Checks that the student's layers above the shared trunk (:mod:`dskd.models.trunk`) compute what the teacher's do."""

from typing import Any

import torch

from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.models.layers import recorded

# Largest accepted difference of the lowest trained layer's output, relative to the norm of the layer's change to its
# input. The same weights and kernels give no difference at all; the tolerance is for kernels that round differently
# when the surrounding model has another shape.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@torch.no_grad()
def difference(
    teacher: Any, engine: Any, *, twin: int, packed: bool, length: int, world: World, dtype: torch.dtype
) -> str | None:
    """Describes how the student's lowest layer differs from the teacher's; None if it does not. All ranks must call it.

    Feeds the teacher's states into the student and compares the inputs and outputs of the lowest layer: on short
    documents, and on a whole sequence, at the end of which rotary positions differ most and some architectures use
    other factors.

    Args:
        teacher: the :class:`dskd.models.frozen.FrozenModel`.
        engine: the student's engine, which still has the teacher's weights.
        twin: index of the teacher's layer of which the student's lowest layer is a copy.
        packed: True if a sequence can hold several documents.
        length: tokens per sequence in training.
        world: the ranks.
        dtype: type of the parameters.
    """
    # Test inputs: two short rows, each of two documents if sequences are packed, and one sequence of full length.
    short = torch.arange(1, 25, device=world.device).view(2, 12) * 7 % teacher.vocab_size
    start = torch.tensor([[*range(7), *range(5)], [*range(5), *range(7)]], device=world.device) if packed else None
    whole = torch.arange(1, length + 1, device=world.device).view(1, -1) * 7 % teacher.vocab_size
    differs = [0.0, 0.0]
    for input_ids, positions in ((short, start), (whole, None)):
        # Run the teacher, then the student on the states that went into the teacher's layer.
        with recorded([teacher.decoder.layers[twin]]) as runs:
            teacher.hidden_states(input_ids, positions)
        expected = runs[0]
        with recorded([engine.module.decoder.layers[0]]) as runs:
            engine(expected.input, positions)
        limit = _TOLERANCE[dtype] * float((expected.output - expected.input).float().norm())
        own = runs[0]
        for index, (theirs, ours) in enumerate(((expected.input, own.input), (expected.output, own.output))):
            # Written with `not … <=` so that a NaN counts as a difference.
            differs[index] += not float((theirs - ours).float().norm()) <= limit
    # All ranks must reach the same decision, even if their hardware rounds differently.
    changes_input, changes_output = sum_over_ranks(torch.tensor(differs, device=world.device)).tolist()
    name = type(engine.module.decoder.base).__name__
    if changes_input:
        return f"{name} changes the states that go into its lowest layer"
    return f"{name}'s lowest trained layer computes something different from the teacher's" if changes_output else None
