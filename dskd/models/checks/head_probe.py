"""Finding out how a model gets from its last hidden states to its logits, by running its own forward.

`config.json` says how, under names that differ between architectures, and an architecture may ignore a name that it
knows. So what the file says counts only if the model itself computes it.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dskd.errors import UserError, first_line
from dskd.models.files.folder import ModelFolder
from dskd.models.structure.base_model import base_model
from dskd.models.structure.output_head import LogitTransform

# Keys of config.json by which the products of states and output matrix are multiplied, divided or capped.
_FACTORS = "logit_scale", "lm_head_multiplier"  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling",)  # Granite
_CAPS = "final_logit_softcapping", "logits_soft_cap"  # Gemma 2; RecurrentGemma
_BASE_WIDTH = "dim_model_base"  # MiniCPM divides states by hidden_size / dim_model_base
# The largest product of the probe, chosen above any cap: Gemma 2 caps its logits at 30, other models at up to 50.
_LARGEST_PRODUCT = 200.0
_TOLERANCE = 1e-4  # relative; both sides compute in float32


@torch.no_grad()
def find_logit_transform(causal_lm: Any, folder: ModelFolder) -> LogitTransform:
    """Returns what the model does with the products of its last hidden states and its output matrix.

    Runs the model's own forward with made-up states and a small output matrix instead of its own. It needs no weights:
    the model may be on the meta device, or sharded.

    Raises:
        UserError: when the logits are neither the plain products nor what config.json declares, for example because of
            a bias.
    """
    from transformers.utils import ModelOutput

    where = f"{folder.path}: {type(causal_lm).__name__}"
    head, base = causal_lm.get_output_embeddings(), base_model(causal_lm)
    if head is None:
        raise UserError(f"{where} has no output matrix; such a model is not supported")
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{where} adds a bias to its logits (lm_head.bias); such a model is not supported yet")
    # Made-up states [1, 2, 8] and a matrix [11, 8], scaled so that the largest product is above any cap.
    small = nn.Linear(8, 11, bias=False)
    small.weight.copy_(torch.linspace(-1, 1, 11 * 8).view(11, 8).sin())
    states = torch.linspace(-3, 3, 2 * 8).view(1, 2, 8)
    states *= _LARGEST_PRODUCT / F.linear(states, small.weight).abs().max()
    try:
        with _replaced(causal_lm, {head: small, base: _GivenStates(states, base)}):
            logits = causal_lm(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.float()
    except (AttributeError, TypeError, RuntimeError, KeyError, ArithmeticError) as error:
        missing = first_line(error)
        if isinstance(error, AttributeError) and isinstance(error.obj, ModelOutput):
            missing = str(error.name)
        raise UserError(
            f"{where} computes its logits from more than the last hidden state ({missing}); such a model is not "
            "supported yet"
        ) from None
    for transform in (declared_transform(causal_lm.config), LogitTransform()):
        expected = transform.apply(F.linear(states, small.weight))
        limit = _TOLERANCE * float(expected.abs().max())
        if logits.shape == expected.shape and torch.allclose(logits, expected, rtol=_TOLERANCE, atol=limit):
            return transform
    keys = ", ".join(f"{key}: {value}" for key, value in _declared(causal_lm.config).items())
    raise UserError(
        f"{where}: its logits are neither the products of last hidden states and output matrix, nor these scaled or "
        f"capped {f'by {keys} ' if keys else ''}as config.json says; such a model is not supported yet"
    )


def declared_transform(model_config: Any) -> LogitTransform:
    """Returns what a model's config says; :func:`find_logit_transform` finds out whether the model does it."""
    declared = _declared(model_config)
    scale = math.prod((declared[key] for key in _FACTORS if key in declared), start=1.0)
    scale /= math.prod((declared[key] for key in _DIVISORS if key in declared), start=1.0)
    if _BASE_WIDTH in declared:
        scale *= declared[_BASE_WIDTH] / model_config.hidden_size
    return LogitTransform(scale, next((declared[key] for key in _CAPS if key in declared), None))


def _declared(model_config: Any) -> dict[str, float]:
    """Returns the keys of a model's config, with values, that may change logits."""
    values = {key: getattr(model_config, key, None) for key in (*_FACTORS, *_DIVISORS, *_CAPS, _BASE_WIDTH)}
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value and math.isfinite(value)
    }


@contextlib.contextmanager
def _replaced(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> Iterator[None]:
    """Temporarily replaces modules of the model by others."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child in replacements
    ]
    for parent, name, child in places:
        setattr(parent, name, replacements[child])
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


class _GivenStates(nn.Module):
    """A stand-in for a base model that always returns the same states, and has the numbers that the model has."""

    def __init__(self, states: torch.Tensor, base: nn.Module) -> None:
        super().__init__()
        self.states = states
        # Falcon-H1's head reads its factor from the base model.
        for name, value in vars(base).items():
            if isinstance(value, int | float) and name not in vars(self):
                setattr(self, name, value)

    @property
    def decoder(self) -> "_GivenStates":
        """Returns itself: OPT's head calls the decoder inside its base model."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the states, in an output that also has the fields that mixtures of experts return."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        @dataclass
        class Output(BaseModelOutputWithPastAndCrossAttentions):
            router_logits: Any = None

        return Output(last_hidden_state=self.states)
