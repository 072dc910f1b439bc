"""Measures how much layers change a model's states: the angle between those that go in and those that come out.

A decoder's layers add to their input. If a block of layers hardly turns the state, the layers above it get nearly the
same input without the block, so it can be removed. The angle is that of arXiv 2403.17887, arccos(cos)/π between the
state that enters a block and the state that leaves it. They measure it at the last token of each text, because its
state alone depends on all of the text. Here it is the mean over all tokens, as ShortGPT (arXiv 2403.03853) measures
single layers: the student is trained at every position, packed sequences have no last token that is special, and a
hundred times as many angles need fewer texts for the same certainty.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from dskd.errors import UserError
from dskd.models.running.frozen import Decoder
from dskd.models.structure.layers import recorded
from dskd.students.spacing import Importance


class Text(NamedTuple):
    """The sequences as a model reads them."""

    input_ids: torch.Tensor  # [B, T]
    position_ids: torch.Tensor | None  # [B, T]; None if those of each row count up from 0
    is_token: torch.Tensor  # [B, T] bool, False for padding


@torch.no_grad()
def measure_blocks(decoder: Decoder, texts: Iterable[Text], block_size: int, device: torch.device) -> Importance:
    """Measures each layer of a decoder, and each block of `block_size` layers, on all tokens of the texts.

    Args:
        decoder: the model, on `device`.
        texts: what it reads, a batch at a time.
        block_size: number of layers of a block, from 1 to all of them.
        device: where it runs.

    Raises:
        UserError: when there are no tokens, or a state is not finite.
    """
    layers = list(decoder.layers)
    count = len(layers)
    sums = {size: torch.zeros(count - size + 1, dtype=torch.float64) for size in {1, block_size}}
    samples = tokens = 0
    for text in texts:
        with recorded(layers) as runs:
            decoder(text.input_ids.to(device), *([] if text.position_ids is None else [text.position_ids.to(device)]))
        # The state that enters each layer, and the one that leaves the last of them, before the final norm.
        is_token = text.is_token.to(device)
        depths = [run.input[is_token] for run in runs] + [runs[-1].output[is_token]]
        for size, total in sums.items():
            total += torch.tensor([_sum_of_angles(depths[at], depths[at + size]) for at in range(len(total))])
        samples, tokens = samples + len(is_token), tokens + int(is_token.sum())
    if not tokens:
        raise UserError("student.spacing: importance needs text, and the training sequences have no tokens; add text")
    means = {size: tuple((total / tokens).tolist()) for size, total in sums.items()}
    if not all(map(math.isfinite, [*means[1], *means[block_size]])):
        raise UserError(
            "student.spacing: importance: the teacher's states are not finite on the training text; check its weights, "
            "or use precision: fp32"
        )
    return Importance(samples, tokens, means[1], means[block_size])


def _sum_of_angles(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns the sum over n tokens of the angle between two states [n, D], in half turns.

    A state of zeros, as the embedding of a padding token can be, counts as orthogonal to every other.
    """
    one, other = (torch.nn.functional.normalize(states.float(), dim=-1) for states in (before, after))
    # Kahan's formula. The arc cosine would lose small angles: in float32, cosines next to 1 are 3e-4 radians apart.
    angles = 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))
    return float(angles.double().sum()) / math.pi
