"""The shared trunk: the lowest layers that teacher and student have in common are computed only once.

A student that is cut from its teacher starts with frozen copies of the teacher's lowest layers. With the same weights
and no dropout their output *is* the teacher's hidden state at that depth. So the teacher hands this state over while it
runs (:class:`HandOver`), and the student consists of the layers above only. The paper does not do this; it does not
change the paper's results.

Whether the trunk is exact depends on which parameters are trained (:func:`trunk_depth`) and on the architecture: some
architectures scale or change the input of their lowest layer, which :func:`difference` detects by running both models.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dskd.config import Config
from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.layers import input_states, recorded
from dskd.training.student import trained_layers, trains_embeddings

# Largest accepted difference of the lowest trained layer's output, relative to the norm of the layer's change to its
# input. The same weights and kernels give no difference at all; the tolerance is for kernels that round differently
# when the surrounding model has another shape.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class TrunkError(UserError):
    """The reason why there is no shared trunk, in words that a user can act on."""


def trunk_depth(config: Config, *, kept: Sequence[int], same_teacher: bool, tied: bool) -> int:
    """Returns how many of the lowest layers the student need not compute itself; 0 if `student.shared_trunk` is off.

    Args:
        config: the experiment.
        kept: indices of the teacher's layers that the student consists of, ascending.
        same_teacher: True if the student was cut from the same teacher that it is trained with.
        tied: True if the student's output matrix and embeddings are the same matrix.

    Raises:
        TrunkError: if there is no such layer, with the reason.
    """
    student = config.student
    if student.shared_trunk == "off":
        return 0
    if not config.needs_teacher:
        raise TrunkError(
            "no term of the loss reads the teacher" if not config.loss.needs_teacher else "teacher.mode is cached"
        )
    if not same_teacher:
        raise TrunkError("the student was cut from another teacher; cut it again with `dskd student`")
    if trains_embeddings(student, tied=tied):
        raise TrunkError("the student's embeddings are trained")
    trained = trained_layers(student, len(kept))
    depth = 0
    # Leave the student at least one layer to run.
    while depth < len(kept) - 1 and kept[depth] == depth and depth not in trained:
        depth += 1
    if not depth:
        reason = "is trained" if kept[0] == 0 else f"is the teacher's layer {kept[0]}"
        raise TrunkError(f"the student's lowest layer {reason}")
    return depth


class HandOver:
    """A hook that keeps the input of one layer of a decoder: the hidden states at that depth."""

    def __init__(self, layers: nn.ModuleList, depth: int) -> None:
        self.depth = depth
        self._states: torch.Tensor | None = None
        self._hook = layers[depth].register_forward_pre_hook(self._keep, with_kwargs=True)

    def take(self) -> torch.Tensor:
        """Returns the states [B, T, D] of the last run and releases them; each run's states can be taken once."""
        assert self._states is not None, "the decoder has not run"
        states, self._states = self._states, None
        return states

    def close(self) -> None:
        """Removes the hook from the decoder."""
        self._hook.remove()

    def _keep(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self._states = input_states(args, kwargs)


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
