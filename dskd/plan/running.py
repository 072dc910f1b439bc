"""Running an architecture without its weights for a plan, under FakeTensorMode, where tensors have no values.

If an architecture uses transformers' attention interface, its attention is replaced by a function that keeps the same
tensors as a fused kernel. Otherwise its own attention runs. A mixture of experts chooses experts by values, so one
expert runs instead, over as many tokens as all chosen experts together.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dskd.errors import UserError, first_line
from dskd.models.files.folder import has_capped_attention
from dskd.models.structure.base_model import base_model
from dskd.plan.architecture import Architecture

_ATTEMPTED = 1, 8  # B, T of the run that tests a way of running the architecture
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k")


@dataclass(frozen=True)
class Way:
    """A way to run an architecture without values."""

    attention: str  # the name of its attention in transformers' interface
    takes_mask: bool  # it takes a mask of all pairs of positions
    returns_router: bool  # its mixtures of experts also return their router's logits

    def prepare(self, model: Any) -> Any:
        """Changes the model so that it runs this way, and returns it."""
        model.set_attn_implementation(self.attention)
        for module in model.modules():
            if hasattr(module, "rope_type"):  # some types read the values of positions to choose their factors
                module.rope_type = "default"
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(getattr(child, "experts", None), nn.ModuleList):
                    setattr(parent, name, _OneExpert(child, model.config, self.returns_router))
        return model


@functools.cache
def find_way(architecture: Architecture, attention: str) -> Way:
    """Returns the first way in which the architecture can be run; `attention` is the name of the attention that
    replaces fused kernels. Raises a UserError when every way fails.
    """
    reason = ""
    # Attention with capped scores is not fused in training.
    attentions = ("eager",) if has_capped_attention(architecture.load_config()) else (attention, "eager")
    for name, takes_mask, returns_router in itertools.product(attentions, (True, False), (True, False)):
        way = Way(name, takes_mask, returns_router)
        try:
            _attempt(architecture, way)
        except UserError:
            raise
        except Exception as error:  # a model that reads a value may raise anything
            reason = reason or first_line(error)
            continue
        return way
    raise _cannot_be_planned(architecture, reason)


@contextlib.contextmanager
def without_values(architecture: Architecture) -> Iterator[None]:
    """Runs its body under FakeTensorMode, and turns an operation that needs values into a UserError."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except DataDependentOutputException as error:
        raise _cannot_be_planned(architecture, str(error)) from None


def _cannot_be_planned(architecture: Architecture, reason: str) -> UserError:
    is_mixture = any("expert" in key for key in architecture.values())
    what = "this mixture of experts" if is_mixture else "this architecture"
    return UserError(
        f"{architecture.named_by}: {what} cannot be planned, because it cannot be run without its weights ({reason}); "
        "training is not affected"
    )


def _attempt(architecture: Architecture, way: Way) -> None:
    layers = list(range(min(2, architecture.values()["num_hidden_layers"])))
    model = way.prepare(architecture.build(layers=layers)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        materialize(model, torch.float32)
        ids = torch.zeros(_ATTEMPTED, dtype=torch.int64)
        size, length = _ATTEMPTED
        mask = {"attention_mask": torch.ones(size, 1, length, length, dtype=torch.bool)} if way.takes_mask else {}
        states = base_model(model)(input_ids=ids, use_cache=False, **mask).last_hidden_state
        if tuple(states.shape[:2]) != _ATTEMPTED:
            raise ValueError(f"its states have the shape {list(states.shape)}")


def materialize(model: Any, dtype: torch.dtype) -> Any:
    """Gives the model fake parameters and buffers, and returns it. Must be called under FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in made:
                made[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=dtype), False)
            module.register_parameter(name, made[id(weight)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def experts_per_token(values: Any) -> int:
    """Returns how many experts process a token, or 1 if the model has no experts."""
    get = values.get if isinstance(values, dict) else lambda key: getattr(values, key, None)
    return next((value for key in _EXPERTS_PER_TOKEN if isinstance(value := get(key), int)), 1)


class _OneExpert(nn.Module):
    """A replacement for a mixture of experts: one of its experts, run over the tokens of all chosen experts."""

    def __init__(self, block: Any, model_config: Any, returns_router: bool) -> None:
        super().__init__()
        self.expert = block.experts[0]
        self.shared: nn.Module | None = next((getattr(block, name) for name in _SHARED if hasattr(block, name)), None)
        self.times = experts_per_token(model_config)
        self.returns_router = returns_router

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Returns states [B, T, D] for states [B, T, D], and None as router logits if the mixture returns those too."""
        rows = states.flatten(0, -2).repeat_interleave(self.times, dim=0)
        result = self.expert(rows).view(-1, self.times, states.shape[-1]).sum(1).view(states.shape)
        if self.shared is not None:
            result = result + self.shared(states)
        return (result, None) if self.returns_router else result
