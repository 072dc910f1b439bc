"""Reading results out of hidden states with the output head, chunk by chunk, so that few logits exist at once.

:func:`top_tokens` computes what the shards store of the teacher's distributions, for training without a teacher
(`teacher.mode: cached`): at every position with a target, the n most probable tokens with their log-probabilities, and
the log of the probability of all others together. Logarithms are natural, the temperature is 1.

Shapes: N positions, D hidden, V vocabulary, n tokens kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from dskd.models.structure.output_head import OutputHead

# Logits in a chunk: 4 MB of float32 on a CPU, which its caches can hold, and 128 MB on a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
_SMALLEST_CHUNK = 64  # for fewer rows, a matrix product spends its time on reading the matrix


def chunk_size(configured: int | None, vocab_size: int, device: torch.device) -> int:
    """Returns how many positions have logits at once: `configured`, or a size that suits the device if None."""
    return configured or max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS[device.type] // vocab_size)


def read_logits(
    read: Callable[..., tuple[torch.Tensor, ...]],
    states: torch.Tensor,
    head: OutputHead,
    chunk_size: int,
    *columns: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Returns what `read` computes from the logits of the states, for all states at once.

    Args:
        read: a function from the logits [n, V] float32 of a chunk, and its rows of each of `columns`, to a tuple of
            tensors [n, …]; a chunk may have no rows.
        states: last hidden states [N, D].
        head: the model's output head.
        chunk_size: positions whose logits exist at once.
        columns: tensors [N, …] of which `read` needs the rows.
    """
    # Splitting gives at least one chunk, so there are tensors to concatenate even if there are no states.
    chunks = zip(*(tensor.split(chunk_size) for tensor in (states, *columns)), strict=True)
    results = [read(head.logits(part), *rows) for part, *rows in chunks]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def predict(states: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Returns the most probable next token [N] after each of the states [N, D]."""
    size = chunk_size(None, len(head.weight), head.weight.device)
    return read_logits(lambda logits: (logits.argmax(-1),), states, head, size)[0]


def next_token(
    states: torch.Tensor, labels: torch.Tensor, head: OutputHead, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the negative log-likelihood [N] float64 of the labels [N], and the most probable tokens [N].

    Logits exist for `chunk_size` of the `states` [N, D] at a time.
    """

    def read(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.cross_entropy(logits, labels, reduction="none").double(), logits.argmax(-1)

    nll, predicted = read_logits(read, states, head, chunk_size, labels)
    return nll, predicted


class TopTokens(NamedTuple):
    """A distribution over the next token at N positions: its most probable tokens, and the rest of it as one number."""

    token_ids: torch.Tensor  # [N, n] integers, most probable first; of equally probable tokens, the lower id first
    logprobs: torch.Tensor  # [N, n]
    rest_logprob: torch.Tensor  # [N], log-probability of all other tokens together; -inf if there are none


@torch.no_grad()
def top_tokens(states: torch.Tensor, head: OutputHead, n: int, chunk_size: int) -> TopTokens:
    """Returns the `n` most probable next tokens after each of the states [N, D], in int64 and float32.

    Args:
        states: last hidden states [N, D].
        head: the model's output head.
        n: at most V.
        chunk_size: positions whose logits exist at once.
    """

    def read(logits: torch.Tensor) -> TopTokens:
        total = logits.logsumexp(dim=-1)
        token_ids = _order(logits).topk(n, dim=-1).indices
        logprobs = logits.gather(1, token_ids) - total[:, None]
        # Sum the probabilities of the rest; 1 minus the sum of the others would lose all digits if the model is
        # certain.
        rest = logits.scatter(1, token_ids, -torch.inf).logsumexp(dim=-1) - total
        return TopTokens(token_ids, logprobs, rest)

    return TopTokens(*read_logits(read, states, head, chunk_size))


def _order(logits: torch.Tensor) -> torch.Tensor:
    """Returns integers [N, V] in the order of the logits, where of equal logits the lower token comes first.

    `topk` alone promises no order of equal values. The bits of floats have the order of integers once those of negative
    floats are inverted.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # adding 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    vocab_size = logits.shape[-1]
    return (ordered << 32) + torch.arange(vocab_size - 1, -1, -1, device=logits.device)
