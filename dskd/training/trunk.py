"""The shared trunk: the lower layers that teacher and student have in common are computed once.

A student that is cut from its teacher starts with frozen copies of the teacher's lowest layers. With the same weights
and no dropout their output *is* the teacher's hidden state at that depth, so the teacher hands it over while it runs
(:class:`HandOver`), and the student consists of the layers above only (not in the paper, whose results it leaves as
they are).

Whether that is exact follows from what is trained (:func:`trunk_depth`), and from the architecture: some scale or
change what goes into their lowest layer. That is found out by running it (:func:`difference`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dskd.config import Config
from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.training.student import trained_layers, trains_embeddings

# The largest difference of the lowest trained layer's result, as a share of what the layer changes. Same weights and
# same kernels make none; this is room for kernels that round otherwise for another shape of the surrounding model.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class TrunkError(UserError):
    """Why there is no shared trunk, in words that a user can act on."""


def trunk_depth(config: Config, *, kept: Sequence[int], same_teacher: bool, tied: bool) -> int:
    """How many of the lowest layers the student need not compute itself; 0 where `student.shared_trunk` is off.

    Args:
        config: the experiment.
        kept: the teacher's layers that the student consists of, ascending.
        same_teacher: whether the student was cut from the very teacher that it is trained with.
        tied: whether its output matrix is its embeddings.

    Raises:
        TrunkError: when there is none.
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
    # At least one layer is left: the student has to have something to run.
    while depth < len(kept) - 1 and kept[depth] == depth and depth not in trained:
        depth += 1
    if not depth:
        reason = "is trained" if kept[0] == 0 else f"is the teacher's layer {kept[0]}"
        raise TrunkError(f"the student's lowest layer {reason}")
    return depth


class HandOver:
    """What goes into a layer of a decoder while the decoder runs: the hidden states at that depth."""

    def __init__(self, layers: nn.ModuleList, depth: int) -> None:
        self.depth = depth
        self._states: torch.Tensor | None = None
        self._hook = layers[depth].register_forward_pre_hook(self._keep, with_kwargs=True)

    def take(self) -> torch.Tensor:
        """The states [B, T, D] of the last run, which are given away."""
        assert self._states is not None, "the decoder has not run"
        states, self._states = self._states, None
        return states

    def close(self) -> None:
        """Lets the decoder run as before."""
        self._hook.remove()

    def _keep(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self._states = _hidden_states(args, kwargs)


@torch.no_grad()
def difference(
    teacher: Any, engine: Any, *, twin: int, packed: bool, length: int, world: World, dtype: torch.dtype
) -> str | None:
    """How the student's lowest layer computes something else than the teacher's, or None. Every rank must call it.

    The teacher's own states go into the student, and what comes out of its lowest layer is compared: in short documents
    and in a whole sequence, at whose end rotary positions differ most and some architectures use other factors.

    Args:
        teacher: the :class:`dskd.models.frozen.FrozenModel`.
        engine: the student's engine, with the teacher's weights still.
        twin: the teacher's layer that the student's lowest is a copy of.
        packed: whether documents stand in one sequence.
        length: tokens of a sequence in training.
        world: the ranks.
        dtype: of the parameters.
    """
    short = torch.arange(1, 25, device=world.device).view(2, 12) * 7 % teacher.vocab_size
    start = torch.tensor([[*range(7), *range(5)], [*range(5), *range(7)]], device=world.device) if packed else None
    whole = torch.arange(1, length + 1, device=world.device).view(1, -1) * 7 % teacher.vocab_size
    differs = [0.0, 0.0]
    for input_ids, positions in ((short, start), (whole, None)):
        with _watched(teacher.decoder.layers[twin]) as expected:
            teacher.hidden_states(input_ids, positions)
        with _watched(engine.module.decoder.layers[0]) as found:
            engine(expected["input"], positions)
        limit = _TOLERANCE[dtype] * float((expected["output"] - expected["input"]).float().norm())
        for index, name in enumerate(("input", "output")):
            # A difference that is not a number is one too.
            differs[index] += not float((expected[name] - found[name]).float().norm()) <= limit
    # Ranks must take the same way, also where their hardware rounds differently.
    changes_input, changes_output = sum_over_ranks(torch.tensor(differs, device=world.device)).tolist()
    name = type(engine.module.decoder.base).__name__
    if changes_input:
        return f"{name} changes the states that go into its lowest layer"
    return f"{name}'s lowest trained layer computes something else than the teacher's" if changes_output else None


@contextlib.contextmanager
def _watched(layer: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """What goes into a layer and comes out of it, in its last run."""
    seen: dict[str, torch.Tensor] = {}

    def keep(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen["input"] = _hidden_states(args, kwargs)
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hook = layer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _hidden_states(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]
