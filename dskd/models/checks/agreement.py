"""A check that an exported model folder, loaded with transformers, computes the same logits as the student in training.

The student runs on a few tokens during training, and the reloaded model runs on the same tokens. Half of the tokens
have positions at the end of a sequence, because an error in the table of rotations only shows there: between
neighbouring positions even a wrong table gives right results. Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dskd.errors import UserError, listed
from dskd.models.checks.loading import load_with_transformers
from dskd.models.checks.probes import accepts, takes_positions
from dskd.models.files.weights import TensorReader
from dskd.models.structure.stored_names import StoredNames

PROBE_TOKENS = 32
# A relative difference of a token's logits (norm of the difference / norm of the logits) up to this is always accepted.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.01}
# In bf16, using other kernels caused differences of .01 to .06 with 2 to 32 layers, growing with depth and with sharper
# attention. A table of rotations in bf16 caused .3 to .9 at 2,048 tokens with sharp attention. The limit is therefore a
# multiple of the model's own rounding error, measured against float32; other kernels caused .9 times that error.
# _USUAL_ROUNDING replaces the measurement on machines without enough memory for the model in float32.
_TIMES_ROUNDING, _LARGEST_TOLERANCE, _USUAL_ROUNDING = 3, 0.3, 0.03


@dataclass(frozen=True)
class Agreement:
    """The difference between a reloaded model and the student in training.

    Both numbers are the largest relative difference over tokens: the norm of the difference of a token's logits,
    divided by the norm of the logits.
    """

    error: float  # when the reloaded model has the trained tensors unrounded
    rounding: float  # the effect of rounding the trained tensors to the type they are stored in


def probe_inputs(base_model: Any, vocab_size: int, sequence_length: int, device: torch.device) -> dict[str, Any]:
    """Returns the inputs for the comparison: `input_ids` [1, T], and positions and a mask if the model takes them.

    The first half of the tokens is at the beginning of a sequence of `sequence_length`, the second half at its end. The
    mask is all ones, so that the model treats the tokens as one document in spite of the gap in positions.
    """
    count = min(PROBE_TOKENS, sequence_length)
    inputs = {"input_ids": torch.arange(count, device=device).unsqueeze(0) * 7 % vocab_size}
    if takes_positions(base_model) and accepts(base_model, "attention_mask"):
        positions = torch.arange(count, device=device)
        positions[count // 2 :] += sequence_length - count
        inputs |= {"position_ids": positions.unsqueeze(0), "attention_mask": torch.ones_like(inputs["input_ids"])}
    return inputs


@torch.no_grad()
def check_agreement(
    folder: Path,
    probe: Mapping[str, torch.Tensor],
    names: Iterable[str],
    dtype: torch.dtype,
    trust_remote_code: bool,
    *,
    trained: Mapping[str, torch.Tensor] | None = None,
    remedy: str,
) -> Agreement:
    """Loads the folder with transformers' AutoModelForCausalLM, and compares its parameters and logits to the student.

    Args:
        folder: the model folder.
        probe: the inputs, and the student's `logits` [1, T, V].
        names: the stored names of the trained tensors; the reloaded model must have each of them.
        dtype: the type in which the student computed `logits`.
        trust_remote_code: whether code in the model folder may run.
        trained: the trained tensors before rounding to the type they are stored in; None if they were not rounded.
        remedy: what the user should do; it ends the error messages.

    Raises:
        UserError: when the model cannot be loaded, lacks a tensor, or differs by more than rounding explains.
    """
    model = load_with_transformers(folder, dtype, trust_remote_code=trust_remote_code, remedy=remedy)
    reader, names = TensorReader(folder), list(names)
    stored_names = StoredNames(model, reader)
    parameters = {stored_names.find(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    # Every trained tensor must be in the reloaded model, with the values that are stored.
    problems = []
    for name in names:
        if name not in parameters:
            problems.append(f"{name}: transformers does not read it")
        elif not torch.equal(parameters[name], reader.read(name).to(parameters[name].dtype)):
            problems.append(f"{name}: the reloaded model has other values")
    if problems:
        raise UserError(listed(f"{folder}: reloaded, the model is not the one that was written; {remedy}", problems))
    # Compute the logits of the stored model and, if storing rounded the trained tensors, those with the unrounded ones:
    # only the latter should equal the student's.
    inputs = {name: tensor for name, tensor in probe.items() if name != "logits"}
    logits = stored = _logits(model, inputs).float()
    exact = {name: tensor.to(parameters[name].dtype) for name, tensor in (trained or {}).items()}
    if any(not torch.equal(parameters[name], tensor) for name, tensor in exact.items()):
        for name, tensor in exact.items():
            parameters[name].copy_(tensor)
        logits = _logits(model, inputs).float()
    # In bf16, a difference above the fixed limit is compared with the model's own rounding error.
    error, token = _difference(logits, probe["logits"])
    limit = _TOLERANCE[dtype]
    if not error <= limit and dtype != torch.float32:
        limit = max(limit, min(_TIMES_ROUNDING * _own_rounding(model, inputs, logits), _LARGEST_TOLERANCE))
    if not error <= limit:
        position = int(inputs["position_ids"][0, token]) if "position_ids" in inputs else token
        raise UserError(
            f"{folder}: reloaded, the model's logits differ from the trained student's by {error:.1e} (relative) at "
            f"position {position}, more than {limit:.1e}; {remedy}"
        )
    return Agreement(error, _difference(stored, logits)[0])


def _own_rounding(model: Any, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> float:
    """Returns the relative difference of `logits` to the model's logits in float32, and leaves the model in float32.

    Returns _USUAL_ROUNDING when there is not enough memory for the model in float32.
    """
    if 4 * sum(parameter.numel() for parameter in model.parameters()) > psutil.virtual_memory().available:
        return _USUAL_ROUNDING
    return _difference(logits, _logits(model.float(), inputs))[0]


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Returns the largest relative difference of a token's logits, and that token's index; both inputs are [1, T, V].

    A constant added to all logits of a token leaves its distribution unchanged, so each token's mean is subtracted.
    """
    logits, expected = (values - values.mean(-1, keepdim=True) for values in (logits.float(), expected.float()))
    shares = (logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    worst = int(shares[0].nan_to_num(torch.inf).argmax())
    return float(shares[0, worst]), worst


def _logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the model's logits of copies of the inputs, because XGLM adds to its positions in place."""
    return model(**{name: value.clone() for name, value in inputs.items()}).logits
