"""Computes the teacher's states for a batch of sequences, and checks that they are finite."""

from typing import Any

import torch

from dskd.corpus.sequences import TokenBatch
from dskd.errors import UserError
from dskd.models.running.frozen import FrozenModel, Readout


def states_of(model: FrozenModel, batch: TokenBatch, first: int) -> torch.Tensor:
    """Computes the last hidden states of a batch; `first` is the number of its first sequence, for error messages.

    Raises a UserError when the state at a position with a target is not finite; every mean with it would not be either.
    """
    hidden = model.hidden_states(batch.input_ids, batch.position_ids)
    _require_finite(model, hidden, batch, first)
    return hidden


def read_states_of(model: FrozenModel, batch: TokenBatch, first: int, readout: Readout) -> tuple[torch.Tensor, Any]:
    """Returns the states as :func:`states_of` does, with its errors, and the result of `readout(states, output
    head)`.
    """
    hidden, result = model.read(
        batch.input_ids, batch.position_ids, lambda hidden, head: (hidden, readout(hidden, head))
    )
    _require_finite(model, hidden, batch, first)
    return hidden, result


def _require_finite(model: FrozenModel, hidden: torch.Tensor, batch: TokenBatch, first: int) -> None:
    not_finite = batch.has_target & ~hidden.isfinite().all(-1).cpu()
    if not_finite.any():
        sequence, position = not_finite.nonzero()[0].tolist()
        raise UserError(
            f"{model.folder.path}: this model's state at position {position} of sequence {first + sequence} is not "
            f"finite, nor are those of {int(not_finite.sum()) - 1} more positions of this batch; check its "
            "weights, or use precision: fp32"
        )
