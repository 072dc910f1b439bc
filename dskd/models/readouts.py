"""Reading results out of hidden states with the output matrix, chunk by chunk, so that few logits exist at one time.

:func:`top_tokens` computes what the shards store of the teacher's distributions, for training without a teacher
(`teacher.mode: cached`): at every position with a target, the n most probable tokens with their log-probabilities, and
the log of the probability of all others together. Logarithms are natural, the temperature is 1.

Shapes: P or N positions, D hidden, V vocabulary, n tokens kept.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

# Logits in a chunk: 4 MB of float32 on a CPU, which its caches can hold, and 128 MB on a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
_SMALLEST_CHUNK = 64  # for fewer rows, a matrix product spends its time on reading the matrix
_LOGITS_CHUNK = 1024


class TopTokens(NamedTuple):
    """The most probable tokens of P positions."""

    token_ids: torch.Tensor  # [P, n] int64, most probable first; of equally probable tokens, the lower id first
    logprobs: torch.Tensor  # [P, n] float32
    rest_logprob: torch.Tensor  # [P] float32, log-probability of all other tokens together; -inf if there are none


@torch.no_grad()
def top_tokens(states: torch.Tensor, head_weight: torch.Tensor, n: int, chunk_size: int) -> TopTokens:
    """Returns the `n` most probable next tokens for each of the states [P, D].

    Args:
        states: last hidden states [P, D].
        head_weight: the output matrix [V, D].
        n: at most V.
        chunk_size: positions whose logits exist at one time.
    """
    # Splitting gives at least one chunk, so there are tensors to concatenate even if there are no states.
    parts = [_of_chunk(F.linear(part, head_weight).float(), n) for part in states.split(chunk_size)]
    return TopTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _of_chunk(logits: torch.Tensor, n: int) -> TopTokens:
    total = logits.logsumexp(dim=-1)
    token_ids = _order(logits).topk(n, dim=-1).indices
    logprobs = logits.gather(1, token_ids) - total[:, None]
    # Sum the probabilities of the rest; 1 minus the sum of the others would lose all digits if the model is certain.
    rest = logits.scatter(1, token_ids, -torch.inf).logsumexp(dim=-1) - total
    return TopTokens(token_ids, logprobs, rest)


def _order(logits: torch.Tensor) -> torch.Tensor:
    """Returns integers [P, V] in the order of the logits, where of equal logits the lower token comes first.

    `topk` alone promises no order of equal values. The bits of floats have the order of integers once those of negative
    floats are inverted.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # adding 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    vocab_size = logits.shape[-1]
    return (ordered << 32) + torch.arange(vocab_size - 1, -1, -1, device=logits.device)


def next_token(
    states: torch.Tensor, labels: torch.Tensor, head_weight: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the negative log-likelihood [n] of the labels and the most probable tokens [n].

    Logits exist for `chunk_size` of the `states` [n, D] at a time.
    """
    nll, predicted = [states.new_zeros(0, dtype=torch.float64)], [labels[:0]]
    for part, wanted in zip(states.split(chunk_size), labels.split(chunk_size), strict=True):
        if len(part):
            logits = F.linear(part, head_weight).float()
            nll.append(F.cross_entropy(logits, wanted, reduction="none").double())
            predicted.append(logits.argmax(-1))
    return torch.cat(nll), torch.cat(predicted)


def chunk_size(wanted: int | None, vocab_size: int, device: torch.device) -> int:
    """Returns how many positions have logits at one time: `wanted`, or a size that suits the device if it is None."""
    return wanted or max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS[device.type] // vocab_size)


def predict(hidden: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """Returns the most probable next token [N] for each of the states [N, D]; logits exist for one chunk at a time."""
    parts = [F.linear(part, head_weight).argmax(-1) for part in hidden.split(_LOGITS_CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=hidden.device)
