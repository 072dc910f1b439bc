"""Checks of a model itself: what training takes for granted of an architecture, found out by running it.

Architectures differ in more than their configuration says: only running them shows whether their logits are a matrix
product, and whether documents that share a sequence stay apart.
"""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.folder import ModelFolder
from dskd.models.stored_names import base_model

_LENGTHS = 7, 5
_TRIALS = 4
# The largest change of a state that should not change, relative to it: a share of what the same exchange changes when
# both documents are one, but no less than rounding. Of 60 decoders those that keep documents apart had no leak at all,
# and moved by up to 7e-7 in float32 and .011 in bf16; the others leaked .3 to 1.5 in either type, LFM2's kind at least
# .04. In another place kernels add up in another order, which deep models make larger.
_LEAK_SHARE, _LEAK_ROUNDING = 0.02, {torch.float32: 1e-5, torch.bfloat16: 4e-3}
_MOVED_SHARE, _MOVED_ROUNDING = 0.1, {torch.float32: 1e-5, torch.bfloat16: 0.02}
# The largest logit of the probe, above any cap: Gemma 2 caps its logits at 30, others at up to 50.
_LARGEST_LOGIT = 200.0


@dataclass(frozen=True)
class Crossing:
    """How much states change, each relative to the state, the median over some trials.

    `ahead`: of a token, when tokens after it are others. `leak`: of the first token of a document, when the document
    before it is another one. `moved`: of a document's tokens, when it is the second document and not the first. The
    last two also when both documents are one, in which tokens see those before.
    """

    ahead: float
    leak: float
    moved: float
    leak_in_one: float
    moved_in_one: float

    def looks_ahead(self, dtype: torch.dtype) -> bool:
        """True if a token sees those after it."""
        return not self.ahead <= max(_LEAK_ROUNDING[dtype], _LEAK_SHARE * self.leak_in_one)

    def crosses(self, dtype: torch.dtype) -> bool:
        """True if a document sees the one before, or depends on its place."""
        return not (
            self.leak <= max(_LEAK_ROUNDING[dtype], _LEAK_SHARE * self.leak_in_one)
            and self.moved <= max(_MOVED_ROUNDING[dtype], _MOVED_SHARE * self.moved_in_one)
        )


@torch.no_grad()
def check_documents(
    run: Callable[..., torch.Tensor],
    decoder: Any,
    folder: ModelFolder,
    world: World,
    dtype: torch.dtype,
    *,
    packed: bool = True,
) -> None:
    """Refuses a model in which a token sees those after it, or in which documents in one sequence see each other.

    Args:
        run: the engine, from token ids and position ids [B, T] to hidden states or logits [B, T, any].
        decoder: the :class:`dskd.models.frozen.Decoder` in it.
        folder: the model's folder.
        world: the ranks; all of them must call this.
        dtype: of the model's parameters.
        packed: whether documents stand in one sequence; otherwise only the first is checked.

    Raises:
        UserError: on every rank, with what to do.
    """
    name = type(decoder.base).__name__
    takes_positions = accepts(decoder.base, "position_ids")
    if packed and not takes_positions:
        raise UserError(_not_apart(folder, name), known_to_all_ranks=True)
    found = measure_crossing(run, decoder.base.config.vocab_size, world.device, with_positions=takes_positions)
    # States that are not finite are refused when the text is read, which names the position.
    is_spoiled = not all(map(math.isfinite, dataclasses.astuple(found)))
    failed = [is_spoiled, found.looks_ahead(dtype), found.crosses(dtype)]
    # Ranks must take the same way, also where their hardware rounds differently.
    is_spoiled, looks_ahead, crosses = (sum_over_ranks(torch.tensor(failed, device=world.device).float()) > 0).tolist()
    if is_spoiled:
        return
    if looks_ahead:
        raise UserError(
            f"{folder.path}: {name} is no decoder: its state of a token depends on the tokens after it. A teacher is a "
            "causal language model",
            known_to_all_ranks=True,
        )
    if packed and crosses:
        raise UserError(_not_apart(folder, name), known_to_all_ranks=True)


def _not_apart(folder: ModelFolder, name: str) -> str:
    return (
        f"{folder.path}: {name} does not keep documents apart that stand in one sequence: its states of a document "
        "depend on the one before. Set corpus.packing to stream, where they may, or to none, where each has a sequence "
        "of its own"
    )


def accepts(module: nn.Module, argument: str) -> bool:
    """True if the module's forward takes an argument of that name."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


@torch.no_grad()
def measure_crossing(
    run: Callable[..., torch.Tensor], vocab_size: int, device: torch.device, *, with_positions: bool = True
) -> Crossing:
    """Runs pairs of short documents in one sequence, and the same with one of the two exchanged.

    What a token must not see, its state must not depend on: it is the same, to the last bit in most models, whatever
    is there. In a mixture of experts it decides which tokens are computed together, so that a few states may be rounded
    into another expert: medians are taken.

    Args:
        run: from token ids, and position ids with `with_positions`, [B, T] to states [B, T, any].
        vocab_size: token ids are below it.
        device: that the model is on.
        with_positions: whether positions start again with each document; otherwise both are one document.
    """
    first, second = _LENGTHS
    generator = torch.Generator().manual_seed(0)

    def documents(length: int) -> torch.Tensor:
        return torch.randint(0, vocab_size, (_TRIALS, length), generator=generator)

    one, other, third, fourth = documents(first), documents(second), documents(first), documents(second)
    pairs = [(one, other), (third, other), (one, fourth), (other, one)]
    rows = [torch.cat(pair, dim=1) for pair in pairs]
    apart = [torch.cat([torch.arange(part.shape[1]) for part in pair]).expand(_TRIALS, -1) for pair in pairs]
    together = [torch.arange(first + second).expand(_TRIALS, -1)] * 3
    input_ids = torch.cat([*rows, rows[0], rows[1], rows[3]]).to(device)
    positions = torch.cat([*apart, *together]).to(device)
    states = run(input_ids, positions) if with_positions else run(input_ids)
    packed, after_another, before_another, swapped, whole, whole_after_another, whole_swapped = states.double().chunk(7)
    size = packed.norm(dim=-1).mean()

    def change(states: torch.Tensor, changed: torch.Tensor) -> float:
        return float(((changed - states).norm(dim=-1) / size).amax(1).median())

    def leak(states: torch.Tensor, changed: torch.Tensor) -> float:
        return change(states[:, first : first + 1], changed[:, first : first + 1])

    def moved(states: torch.Tensor, changed: torch.Tensor) -> float:
        return max(change(states[:, :first], changed[:, second:]), change(states[:, first:], changed[:, :second]))

    return Crossing(
        ahead=change(packed[:, :first], before_another[:, :first]),
        leak=leak(packed, after_another),
        moved=moved(packed, swapped),
        leak_in_one=leak(whole, whole_after_another),
        moved_in_one=moved(whole, whole_swapped),
    )


@torch.no_grad()
def check_head(causal_lm: Any, folder: ModelFolder) -> None:
    """Refuses a model whose logits are more than last hidden state times output matrix.

    Some architectures scale or cap their logits, or add a bias. The model's own forward is run with states that are
    made up and with a small output matrix in place of its own, and its logits are compared with the plain product. It
    needs no weights: the model may be on the meta device, or sharded.

    Raises:
        UserError: with the reason.
    """
    name = type(causal_lm).__name__
    where = f"{folder.path}: {name}"
    head = causal_lm.get_output_embeddings()
    base = base_model(causal_lm)
    if head is None:
        raise UserError(f"{where} has no output matrix; such a model is not supported")
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{where} adds a bias to its logits (lm_head.bias); such a model is not supported yet")
    weight = torch.linspace(-1, 1, 11 * 8).view(11, 8).sin()
    states = torch.linspace(-3, 3, 2 * 8).view(1, 2, 8)
    plain = F.linear(states, weight)
    states = states * (_LARGEST_LOGIT / plain.abs().max())
    plain = F.linear(states, weight)
    small = nn.Linear(8, 11, bias=False)
    small.weight.copy_(weight)
    try:
        with _replaced(causal_lm, {head: small, base: _GivenStates(states)}):
            logits = causal_lm(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.float()
        same = logits.shape == plain.shape and torch.allclose(logits, plain, rtol=1e-2, atol=1e-3 * _LARGEST_LOGIT)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{where} reads more of its base model than last hidden states ({reason}); such a model is not supported "
            "yet"
        ) from None
    if not same:
        raise UserError(
            f"{where} does more than a matrix product to get from its last hidden state to its logits "
            f"({_head_keys(causal_lm.config) or 'a bias, a scale or a cap'}); such a model is not supported yet"
        )


def _head_keys(model_config: Any) -> str:
    """The keys of config.json that change what comes after the output matrix."""
    keys = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap")
    found = {key: value for key in keys if (value := getattr(model_config, key, None)) not in (None, 1.0)}
    return ", ".join(f"{key}: {value}" for key, value in found.items())


@contextlib.contextmanager
def _replaced(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> Iterator[None]:
    """The model with other modules in the place of some, for a time."""
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
    """A stand-in for a base model that returns the states it was given."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    @property
    def decoder(self) -> "_GivenStates":
        """Some heads call a part of their base model: OPT's."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The states, in an output that has what mixtures of experts return too."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        @dataclass
        class Output(BaseModelOutputWithPastAndCrossAttentions):
            router_logits: Any = None

        return Output(last_hidden_state=self.states)
