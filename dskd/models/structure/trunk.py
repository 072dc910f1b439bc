"""The shared trunk: the lowest layers that teacher and student have in common are computed only once.

A student that is cut from its teacher starts with frozen copies of the teacher's lowest layers. With the same weights
and no dropout their output *is* the teacher's hidden state at that depth. So the teacher hands this state over while it
runs (:class:`HandOver`), in training or in annotation, which stores it, and the student consists of the layers above
only. The paper does not do this; it does not change the paper's results.

Whether the trunk is exact depends on which parameters are trained (:func:`trunk_depth`) and on the architecture: some
architectures scale or change the input of their lowest layer. To detect it, :mod:`dskd.training.models.trunk_check`
runs both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dskd.config import StudentConfig
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder
from dskd.models.structure.causal_lm import fits_without_lower_layers
from dskd.models.structure.layers import input_states
from dskd.models.structure.trained import trained_layers, trains_embeddings


class TrunkError(UserError):
    """The error that there is no shared trunk, with the reason in words that a user can act on."""


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
    trained = trained_layers(student, len(kept))
    problem = student.why_no_trunk_above(kept[0], len(kept), trains_embeddings=trains_embeddings(student, tied=tied))
    if problem is not None:
        raise TrunkError(problem)
    depth = 0
    # Leave the student at least one layer to run.
    while depth < len(kept) - 1 and kept[depth] == depth and depth not in trained:
        depth += 1
    return depth


def require_same_shapes(folder: ModelFolder, depth: int) -> None:
    """Checks that a model's layers from `depth` on can be built without those below, which would change their places.

    Raises:
        TrunkError: if they would have other shapes.
    """
    if not fits_without_lower_layers(folder, depth):
        raise TrunkError("in this architecture a layer's shape depends on its place")


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
