"""Checks that run a model to test what training assumes about its architecture.

Architectures differ in more ways than their configuration shows. Only running a model shows whether documents that
share a sequence stay apart.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder

_LENGTHS = 7, 5  # tokens of the first and of the second document
_TRIALS = 4
# Limits of the change, relative to the state, of a state that should not change: a share of the change that the same
# exchange causes when both documents are treated as one, but at least the rounding error. Of 60 decoders tested, those
# that keep documents apart had no leak at all, and moved by up to 7e-7 in float32 and .011 in bf16. The others leaked
# .3 to 1.5 in either type, and models of LFM2's kind at least .04. States move because kernels sum in another order at
# another place in the sequence; deep models amplify this.
_LEAK_SHARE, _LEAK_ROUNDING = 0.02, {torch.float32: 1e-5, torch.bfloat16: 4e-3}
_MOVED_SHARE, _MOVED_ROUNDING = 0.1, {torch.float32: 1e-5, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Crossing:
    """The relative changes of states when other tokens of the sequence change, each a median over some trials.

    `leak_in_one` and `moved_in_one` are the same measurements with both documents treated as one, in which tokens do
    see the ones before them. They show how large a real dependence is.
    """

    ahead: float  # of the first tokens' states, when the tokens after them are replaced
    leak: float  # of the state of a document's first token, when the document before it is replaced
    moved: float  # of a document's states, when it trades places with the other document
    leak_in_one: float
    moved_in_one: float

    def looks_ahead(self, dtype: torch.dtype) -> bool:
        """Returns True if a token sees the tokens after it."""
        return not self.ahead <= max(_LEAK_ROUNDING[dtype], _LEAK_SHARE * self.leak_in_one)

    def crosses(self, dtype: torch.dtype) -> bool:
        """Returns True if a document sees the one before it, or depends on its place in the sequence."""
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
        decoder: the :class:`dskd.models.running.frozen.Decoder` in it.
        folder: the model's folder.
        world: the ranks; all of them must call this.
        dtype: the type of the model's parameters.
        packed: whether sequences contain several documents. If not, only whether tokens see later ones is checked.

    Raises:
        UserError: on every rank when the model is refused, with what to do.
    """
    name = type(decoder.base).__name__
    with_positions = takes_positions(decoder.base)
    if packed and not with_positions:
        raise UserError(_not_apart(folder, name), known_to_all_ranks=True)
    crossing = measure_crossing(run, decoder.base.config.vocab_size, world.device, with_positions=with_positions)
    # Running the model on the text refuses states that are not finite, and can name the position.
    is_spoiled = not all(map(math.isfinite, dataclasses.astuple(crossing)))
    failed = [is_spoiled, crossing.looks_ahead(dtype), crossing.crosses(dtype)]
    # All ranks must reach the same decision, even if their hardware rounds differently.
    is_spoiled, looks_ahead, crosses = (sum_over_ranks(torch.tensor(failed, device=world.device).float()) > 0).tolist()
    if is_spoiled:
        return
    if looks_ahead:
        raise UserError(
            f"{folder.path}: {name} is not a decoder: its state of a token depends on the tokens after it. A teacher "
            "is a causal language model",
            known_to_all_ranks=True,
        )
    if packed and crosses:
        raise UserError(_not_apart(folder, name), known_to_all_ranks=True)


def _not_apart(folder: ModelFolder, name: str) -> str:
    return (
        f"{folder.path}: {name} does not keep documents apart that share a sequence: its states of a document "
        "depend on the one before. Set corpus.packing to stream, if they may, or to none, which gives each a sequence "
        "of its own"
    )


def accepts(module: nn.Module, argument: str) -> bool:
    """Returns True if the module's forward can be called with an argument of that name."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def takes_positions(base_model: nn.Module) -> bool:
    """Returns True if a base model reads position ids: its forward names them.

    Models without positions, such as BLOOM and MPT, accept any argument and ignore this one.
    """
    return "position_ids" in inspect.signature(base_model.forward).parameters


@torch.no_grad()
def measure_crossing(
    run: Callable[..., torch.Tensor], vocab_size: int, device: torch.device, *, with_positions: bool = True
) -> Crossing:
    """Runs pairs of short documents in one sequence, and again with one document of the pair replaced or both swapped.

    The state of a token must not depend on tokens that it must not see: whatever they are, the state stays the same, in
    most models to the last bit. In a mixture of experts, tokens that are not seen still decide which tokens an expert
    computes together, so rounding may send a few tokens to another expert. Medians over trials ignore them.

    Args:
        run: a function from token ids, and position ids if `with_positions`, both [B, T], to states [B, T, any].
        vocab_size: the upper bound of token ids.
        device: the device of the model.
        with_positions: whether positions restart with each document; otherwise the model sees the two as one document.
    """
    first, second = _LENGTHS
    generator = torch.Generator().manual_seed(0)

    def documents(length: int) -> torch.Tensor:
        return torch.randint(0, vocab_size, (_TRIALS, length), generator=generator)

    one, other, third, fourth = documents(first), documents(second), documents(first), documents(second)
    # Four sequences of two documents: a pair, the pair with its first document replaced, with its second replaced, and
    # with the two swapped. `apart` has positions that restart with the second document.
    pairs = [(one, other), (third, other), (one, fourth), (other, one)]
    rows = [torch.cat(pair, dim=1) for pair in pairs]
    apart = [torch.cat([torch.arange(part.shape[1]) for part in pair]).expand(_TRIALS, -1) for pair in pairs]
    # The same again with positions that count through, to see how large a change is when tokens do see the others. All
    # variants run in one batch, so that they are computed alike.
    together = [torch.arange(first + second).expand(_TRIALS, -1)] * 4
    input_ids = torch.cat([*rows, *rows]).to(device)
    positions = torch.cat([*apart, *together]).to(device)
    states = run(input_ids, positions) if with_positions else run(input_ids)
    states = states.double()
    packed, after_another, before_another, swapped = states[: len(states) // 2].chunk(4)
    whole, whole_after_another, whole_before_another, whole_swapped = states[len(states) // 2 :].chunk(4)
    size = packed.norm(dim=-1).mean()

    def change(states: torch.Tensor, changed: torch.Tensor) -> float:
        return float(((changed - states).norm(dim=-1) / size).amax(1).median())

    def leak(states: torch.Tensor, changed: torch.Tensor) -> float:
        return change(states[:, first : first + 1], changed[:, first : first + 1])

    def moved(states: torch.Tensor, changed: torch.Tensor) -> float:
        return max(change(states[:, :first], changed[:, second:]), change(states[:, first:], changed[:, :second]))

    return Crossing(
        ahead=max(
            change(packed[:, :first], before_another[:, :first]),
            change(whole[:, :first], whole_before_another[:, :first]),
        ),
        leak=leak(packed, after_another),
        moved=moved(packed, swapped),
        leak_in_one=leak(whole, whole_after_another),
        moved_in_one=moved(whole, whole_swapped),
    )
