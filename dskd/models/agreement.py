"""Whether a model folder, loaded as any user would load it, computes what the student does in training.

A few tokens are run in training and again in the reloaded model. Half of them have positions at the end of a sequence,
where a wrong table of rotations shows: between neighbours it is right in any case. Shapes: T tokens, V vocabulary.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dskd.errors import UserError, listed
from dskd.models.stored_names import StoredNames
from dskd.models.weights import TensorReader

PROBE_TOKENS = 32
# The difference of a token's logits that needs no explanation, as a share of their length.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.01}
# In bf16 other kernels made a difference of .01 to .06 at 2 to 32 layers, more with depth and with sharper attention; a
# table of rotations in bf16 .3 to .9 at 2,048 tokens where attention is sharp. So the limit is a multiple of what the
# model's own rounding is, measured against float32: other kernels had .9 times that. _USUAL_ROUNDING is for machines
# that have no memory for the model in float32.
_TIMES_ROUNDING, _LARGEST_TOLERANCE, _USUAL_ROUNDING = 3, 0.3, 0.03
_CANNOT_LOAD = (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError, TypeError)


@dataclass(frozen=True)
class Agreement:
    """How far a reloaded model is from the student in training: the largest difference of a token's logits, as a share
    of their length.
    """

    error: float  # with the trained tensors as they were trained
    rounding: float  # what their rounding to the type they are stored in adds


def probe_inputs(base_model: Any, vocab_size: int, sequence_length: int, device: torch.device) -> dict[str, Any]:
    """Returns what the student is run on: `input_ids` [1, T], and where the model takes positions those and a mask.

    The first half of the tokens is at the beginning of a sequence of `sequence_length`, the second half at its end. The
    mask, of ones, says that all of them belong together in spite of the gap.
    """
    count = min(PROBE_TOKENS, sequence_length)
    inputs = {"input_ids": torch.arange(count, device=device).unsqueeze(0) * 7 % vocab_size}
    parameters = inspect.signature(base_model.forward).parameters.values()
    takes_mask = any(p.name == "attention_mask" or p.kind is p.VAR_KEYWORD for p in parameters)
    if takes_mask and any(p.name == "position_ids" for p in parameters):
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
    """Loads the folder as any user would, and compares its parameters and logits with the student's.

    Args:
        folder: the model.
        probe: the inputs, and the student's `logits` [1, T, V].
        names: the stored names of the trained tensors; the reloaded model must have each of them.
        dtype: what the student was run in.
        trust_remote_code: whether the model may bring code.
        trained: the trained tensors before they were rounded to the type they are stored in; None if they were not.
        remedy: what to do, for the messages.

    Raises:
        UserError: when it cannot be loaded, lacks a tensor, or computes something else than rounding explains.
    """
    model = _load(folder, dtype, trust_remote_code, remedy)
    reader, names = TensorReader(folder), list(names)
    stored_names = StoredNames(model, reader)
    parameters = {stored_names.find(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    problems = []
    for name in names:
        if name not in parameters:
            problems.append(f"{name}: transformers does not read it")
        elif not torch.equal(parameters[name], reader.read(name).to(parameters[name].dtype)):
            problems.append(f"{name}: the reloaded model has other values")
    if problems:
        raise UserError(listed(f"{folder}: reloaded, the model is not the one that was written; {remedy}", problems))
    inputs = {name: tensor for name, tensor in probe.items() if name != "logits"}
    logits = stored = model(**inputs).logits.float()
    exact = {name: tensor.to(parameters[name].dtype) for name, tensor in (trained or {}).items()}
    if any(not torch.equal(parameters[name], tensor) for name, tensor in exact.items()):
        for name, tensor in exact.items():
            parameters[name].copy_(tensor)
        logits = model(**inputs).logits.float()
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


def _load(folder: Path, dtype: torch.dtype, trust_remote_code: bool, remedy: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except _CANNOT_LOAD as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: transformers cannot load this model ({reason}); {remedy}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            listed(f"{folder}: transformers fills these in at random, since they are not stored; {remedy}", missing)
        )
    return model.eval()


def _own_rounding(model: Any, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> float:
    """Returns how far a model's logits are from what it computes in float32, in which it is left."""
    if 4 * sum(parameter.numel() for parameter in model.parameters()) > psutil.virtual_memory().available:
        return _USUAL_ROUNDING
    return _difference(logits, model.float()(**inputs).logits)[0]


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """The largest difference of a token's logits as a share of their length, and the token; [1, T, V] each.

    A constant that is added to all logits of a token changes nothing, so their mean is taken off.
    """
    logits, expected = (values - values.mean(-1, keepdim=True) for values in (logits.float(), expected.float()))
    shares = (logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    worst = int(shares[0].nan_to_num(torch.inf).argmax())
    return float(shares[0, worst]), worst
