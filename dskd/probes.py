"""What the rest takes for granted of a model, tried on the model itself when it is loaded.

Architectures differ in more than their configuration says: only running them shows whether their logits are a matrix
product, and whether documents that share a sequence stay apart.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dskd.distributed import World, sum_over_ranks
from dskd.errors import UserError
from dskd.model_folder import ModelFolder
from dskd.stored_names import base_model_name

# The largest difference, as a share of what crossing the boundary changes. Where documents stay apart rounding is all
# that differs; seven architectures that let them cross had 0.5 to 1.0, in either type.
_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.2}
_LENGTHS = 7, 5


@torch.no_grad()
def check_documents(
    run: Callable[..., torch.Tensor], decoder: Any, folder: ModelFolder, world: World, dtype: torch.dtype
) -> None:
    """Refuses a model that lets documents in one sequence see each other although their positions start again.

    Two short documents are packed in both orders. What comes first cannot depend on what follows, so each document's
    result must be the same in both places. How much would change if they did see each other is measured in the same
    pass, by a third sequence in which positions only count up.

    Args:
        run: the engine, from token ids and position ids [B, T] to hidden states or logits [B, T, any].
        decoder: the :class:`dskd.models.Decoder` in it.
        folder: the model's folder.
        world: the ranks; all of them must call this.
        dtype: of the model's parameters.

    Raises:
        UserError: on every rank, with what to do.
    """
    parameters = inspect.signature(decoder.base.forward).parameters.values()
    takes_positions = any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)
    if takes_positions and not _crosses(run, decoder.base.config.vocab_size, world, dtype):
        return
    raise UserError(
        f"{folder.path}: {type(decoder.base).__name__} does not keep documents apart that stand in one sequence: its "
        "states of a document depend on the one before. Set corpus.packing to stream, where they may, or to none, "
        "where each has a sequence of its own",
        known_to_all_ranks=True,
    )


def _crosses(run: Callable[..., torch.Tensor], vocab_size: int, world: World, dtype: torch.dtype) -> bool:
    one, other = (torch.arange(1, length + 1) for length in _LENGTHS)
    documents = 3 * one % vocab_size, (5 * other + 1) % vocab_size
    input_ids = torch.stack([torch.cat(documents), torch.cat(documents[::-1]), torch.cat(documents)])
    positions = [torch.cat([one, other]), torch.cat([other, one]), torch.arange(1, sum(_LENGTHS) + 1)]
    packed, swapped, crossing = run(input_ids.to(world.device), torch.stack(positions).to(world.device) - 1).float()
    expected = swapped.roll(_LENGTHS[0], dims=0)
    limit = _TOLERANCE[dtype] * (crossing - expected).norm() + torch.finfo(dtype).eps * expected.norm()
    # Ranks must take the same way, also where their hardware rounds differently.
    return bool(sum_over_ranks(((packed - expected).norm() > limit).float()) > 0)


def check_head(causal_lm: Any, folder: ModelFolder) -> None:
    """Refuses a model whose logits are more than last hidden state times output matrix.

    Some architectures scale or cap their logits, or add a bias. The model's own forward is run behind states that are
    made up, and its logits are compared with the plain product.
    """
    import deepspeed  # here: commands that load no model do not wait for it

    weight = causal_lm.get_output_embeddings().weight
    prefix = base_model_name(causal_lm)
    base_model = getattr(causal_lm, prefix)
    with deepspeed.zero.GatheredParameters(list(causal_lm.get_output_embeddings().parameters())), torch.no_grad():
        states = torch.linspace(-3, 3, 2 * weight.shape[1], device=weight.device).view(1, 2, -1).to(weight.dtype)
        setattr(causal_lm, prefix, _GivenStates(states))
        try:
            logits = causal_lm(input_ids=torch.zeros(1, 2, dtype=torch.long, device=weight.device)).logits
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"{folder.path}: {type(causal_lm).__name__} reads more of its base model than last hidden states "
                f"({error}); such a model is not supported yet"
            ) from None
        finally:
            setattr(causal_lm, prefix, base_model)
        plain = F.linear(states, weight)
        same = torch.allclose(logits.float(), plain.float(), rtol=1e-2, atol=1e-3 * float(plain.abs().max()))
    if not same:
        raise UserError(
            f"{folder.path}: {type(causal_lm).__name__} does more than a matrix product to get from its last hidden "
            "state to its logits (a bias, a scale or a cap); such a model is not supported yet"
        )


class _GivenStates(nn.Module):
    """Stands in for a base model and returns the states it was given."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.states)
