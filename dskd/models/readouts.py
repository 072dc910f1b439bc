"""What the shards keep of the teacher's distributions, for training without a teacher (`teacher.mode: cached`).

At every position with a target: the n most probable tokens with their log-probabilities, and the log of the mass of all
others. Natural logarithms, temperature 1. Shapes: B batch, T tokens, D hidden, V vocabulary, n tokens kept.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

# Logits in a chunk: 4 MB of float32, which the caches of a processor hold, and 128 MB.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
_SMALLEST_CHUNK = 64  # a matrix product over fewer rows reads the whole matrix for too little
_LOGITS_CHUNK = 1024


class TopTokens(NamedTuple):
    """The most probable tokens of P positions."""

    token_ids: torch.Tensor  # [P, n] int64, most probable first, of equals the lower one first
    logprobs: torch.Tensor  # [P, n] float32
    rest_logprob: torch.Tensor  # [P] float32, the log of the mass of all other tokens; -inf where there is none


@torch.no_grad()
def top_tokens(states: torch.Tensor, head_weight: torch.Tensor, n: int, chunk_size: int) -> TopTokens:
    """The `n` most probable tokens behind each of the states [P, D]; logits exist for `chunk_size` positions at a time.

    Args:
        states: last hidden states [P, D].
        head_weight: the output matrix [V, D].
        n: at most V.
        chunk_size: positions whose logits exist at one time.
    """
    # One chunk at least, so that there are tensors to join where there is no state.
    parts = [_of_chunk(F.linear(part, head_weight).float(), n) for part in states.split(chunk_size)]
    return TopTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _of_chunk(logits: torch.Tensor, n: int) -> TopTokens:
    total = logits.logsumexp(dim=-1)
    token_ids = _order(logits).topk(n, dim=-1).indices
    logprobs = logits.gather(1, token_ids) - total[:, None]
    # Summed over the rest, not 1 - sum: that has no digits left where the model is sure.
    rest = logits.scatter(1, token_ids, -torch.inf).logsumexp(dim=-1) - total
    return TopTokens(token_ids, logprobs, rest)


def _order(logits: torch.Tensor) -> torch.Tensor:
    """Integers [P, V] that are ordered as the logits are, of equal ones the lower token first: `topk` promises none.

    The bits of a float are ordered like integers once those of negative ones are turned round.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0 makes one zero of two
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    vocab_size = logits.shape[-1]
    return (ordered << 32) + torch.arange(vocab_size - 1, -1, -1, device=logits.device)


def next_token(
    states: torch.Tensor, labels: torch.Tensor, head_weight: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood [n] of the labels and the most probable tokens [n]; logits one chunk at a time."""
    nll, predicted = [states.new_zeros(0, dtype=torch.float64)], [labels[:0]]
    for part, wanted in zip(states.split(chunk_size), labels.split(chunk_size), strict=True):
        if len(part):
            logits = F.linear(part, head_weight).float()
            nll.append(F.cross_entropy(logits, wanted, reduction="none").double())
            predicted.append(logits.argmax(-1))
    return torch.cat(nll), torch.cat(predicted)


def chunk_size(wanted: int | None, vocab_size: int, device: torch.device) -> int:
    """How many positions have logits at one time: as wanted, or as many as suit the device."""
    return wanted or max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS[device.type] // vocab_size)


def predict(hidden: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """The most probable next token [N] behind each of the states [N, D]; logits exist for one chunk at a time."""
    parts = [F.linear(part, head_weight).argmax(-1) for part in hidden.split(_LOGITS_CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=hidden.device)
