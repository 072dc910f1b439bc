"""The shared trunk: the lowest layers that teacher and student have in common are computed only once.

A student that is cut from its teacher starts with frozen copies of the teacher's lowest layers. With the same weights
and no dropout their output *is* the teacher's hidden state at that depth. So the teacher hands this state over while it
runs (:class:`HandOver`), in training or in annotation, which stores it, and the student consists of the layers above
only. The paper does not do this; it does not change the paper's results.

Whether the trunk is exact depends on which parameters are trained (:func:`trunk_depth`) and on the architecture: some
architectures scale or change the input of their lowest layer. :mod:`dskd.training.trunk_check` runs both to detect it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dskd.config import StudentConfig
from dskd.errors import UserError
from dskd.models.layers import input_states
from dskd.models.trained import trained_layers, trains_embeddings


class TrunkError(UserError):
    """Raised when there is no shared trunk, with the reason in words that a user can act on."""


def trunk_depth(
    student: StudentConfig, *, kept: Sequence[int], same_teacher: bool, tied: bool, no_source: str | None = None
) -> int:
    """Returns how many of the lowest layers the student need not compute itself; 0 if `student.shared_trunk` is off.

    Args:
        student: the student's section of the config.
        kept: indices of the teacher's layers that the student consists of, ascending.
        same_teacher: True if the student was cut from the same teacher that it is trained with.
        tied: True if the student's output matrix and embeddings are the same matrix.
        no_source: why nothing provides the trunk's states; None if a loaded teacher or the shards do.

    Raises:
        TrunkError: if there is no such layer, with the reason.
    """
    if student.shared_trunk == "off":
        return 0
    if no_source is not None:
        raise TrunkError(no_source)
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


def refuse_if_required(student: StudentConfig, problem: str) -> None:
    """Raises a UserError if the config requires the shared trunk that is not possible because of `problem`."""
    if student.shared_trunk == "on":
        raise UserError(
            f"student.shared_trunk: on is not possible: {problem}; set it to auto, and the student computes all of its "
            "layers",
            known_to_all_ranks=True,
        ) from None


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
