"""Comparing a cut student to its teacher without the other layers, before the student is published.

Tensors, settings and shapes of the kept layers are compared one by one elsewhere. This comparison runs both models, so
it also finds a layer whose result depends on its place among all layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dskd.console import say
from dskd.errors import UserError, reason_of
from dskd.models.checks.agreement import PROBE_TOKENS, probe_inputs
from dskd.models.checks.reference import SMALL_BYTES, load_whole, relative_difference
from dskd.models.files.folder import BAD_CONFIG, ModelFolder
from dskd.models.files.weights import TensorReader
from dskd.models.limits import position_limit
from dskd.models.structure.base_model import base_model
from dskd.models.structure.layers import input_states, layers_of

_TOLERANCE = 1e-5  # relative to the norm of the states; healthy architectures do not differ at all


def can_be_compared(teacher: ModelFolder) -> bool:
    """Returns True if the teacher is small enough to be loaded whole, in float32."""
    return TensorReader(teacher.path).numel * torch.float32.itemsize <= SMALL_BYTES


@torch.no_grad()
def compare_with_pruned_teacher(teacher: ModelFolder, student: Any, layers: Sequence[int]) -> None:
    """Refuses a student whose last hidden states differ from those of its teacher without the other layers.

    Both run on the CPU in float32, on tokens of which half have the last positions that config.json allows.

    Args:
        teacher: the teacher's folder; transformers loads it whole.
        student: the causal LM that transformers loaded from the student's folder, in float32.
        layers: the teacher's layers that the student keeps, ascending.

    Raises:
        UserError: when they differ, with the architecture and the difference, or when none of the teacher's states is
            finite.
    """
    whole = load_whole(teacher, torch.float32).eval()
    # A dropped layer runs and returns its input, so that the teacher's code, settings and layer numbers stay unchanged.
    for number, layer in enumerate(layers_of(whole)):
        if number not in layers:
            layer.register_forward_hook(_return_input, with_kwargs=True)
    length = position_limit(whole.config) or PROBE_TOKENS
    probe = probe_inputs(whole, whole.config.vocab_size, length, torch.device("cpu"))
    name = type(student).__name__
    try:
        expected = _last_states(whole, probe)
    except BAD_CONFIG as error:
        say(f"  not compared with the teacher: {name} does not run on this machine's CPU ({reason_of(error)})")
        return
    del whole
    if not expected.isfinite().any():
        raise UserError(
            f"{teacher.path}: {name} computes states that are not finite. Are its weights damaged, or a number in its "
            "config.json?"
        )
    difference = relative_difference(_last_states(base_model(student), probe), expected)
    kept = ", ".join(map(str, layers))
    if not difference <= _TOLERANCE:
        raise UserError(
            f"student.layers: {name} with the teacher's layers {kept} alone computes something different from the "
            f"teacher without its other layers: the last hidden states differ by {difference:.1e} of their norm. What "
            "a layer of this architecture computes depends on its place, so keep others, for example the lowest ones "
            "(student.spacing: first), or all"
        )
    tokens = probe["input_ids"].numel()
    last = int(probe["position_ids"].max()) if "position_ids" in probe else tokens - 1
    say(
        f"  compared with the teacher without its other layers: last hidden states of {tokens} tokens, "
        f"up to position {last}"
    )


def _return_input(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    states = input_states(args, kwargs)
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _last_states(base: Any, probe: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the last hidden states [1, T, D] of copies of the inputs, because XGLM adds to its positions in place."""
    return base(**{name: value.clone() for name, value in probe.items()}, use_cache=False)[0]
