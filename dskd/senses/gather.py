"""The teacher's states, sampled per token (method, section 2).

Every position's state belongs to a token: the one the teacher predicts there, or the actual next one (`senses.key`).
Each token is owned by one rank, which keeps a bounded random sample of its states. A state's chance is decided by a
random priority that is a function of (seed, sequence, position), so the sample is the same for any number of ranks,
any batch size and any order of arrival.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from dskd.config import SensesConfig
from dskd.console import progress_bar
from dskd.distributed import World
from dskd.models import FrozenModel
from dskd.random_numbers import derived_seed, random_bits
from dskd.sequences import Sequences, TokenBatch

_LOGITS_CHUNK = 1024


@dataclass(frozen=True)
class TokenStates:
    """States of the tokens a rank owns, sorted by token, then by priority. n states in all."""

    tokens: torch.Tensor  # [m] distinct tokens, ascending
    offsets: torch.Tensor  # [m+1]; states of tokens[j] are offsets[j]:offsets[j+1]
    states: torch.Tensor  # [n, D]


class Reservoir:
    """Keeps the `max_states` states of lowest priority of every token; memory is bounded by that and a buffer."""

    def __init__(self, vocab_size: int, max_states: int, hidden_size: int, *, buffer_states: int = 65_536) -> None:
        self._max_states = max_states
        self._buffer_states = buffer_states
        # Once a token is full, later states above its highest kept priority are dropped on arrival.
        self._thresholds = torch.full((vocab_size,), torch.iinfo(torch.int64).max)
        self._tokens = [torch.empty(0, dtype=torch.int64)]
        self._priorities = [torch.empty(0, dtype=torch.int64)]
        self._states = [torch.empty(0, hidden_size, dtype=torch.bfloat16)]
        self._buffered = 0

    def add(self, tokens: torch.Tensor, priorities: torch.Tensor, states: torch.Tensor) -> None:
        """Offers states [n, D] with their tokens [n] and priorities [n]."""
        wanted = priorities < self._thresholds[tokens]
        self._tokens.append(tokens[wanted])
        self._priorities.append(priorities[wanted])
        self._states.append(states[wanted].to(torch.bfloat16))
        self._buffered += len(self._tokens[-1])
        if self._buffered > max(self._buffer_states, len(self._tokens[0]) // 2):
            self._compact()

    def finish(self) -> TokenStates:
        """The sample."""
        self._compact()
        tokens, counts = self._tokens[0].unique_consecutive(return_counts=True)
        return TokenStates(tokens, F.pad(counts.cumsum(0), (1, 0)), self._states[0])

    def _compact(self) -> None:
        tokens, priorities = torch.cat(self._tokens), torch.cat(self._priorities)
        order = priorities.argsort(stable=True)
        order = order[tokens[order].argsort(stable=True)]
        tokens, priorities = tokens[order], priorities[order]
        _, counts = tokens.unique_consecutive(return_counts=True)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = torch.arange(len(tokens)) - starts  # 0 for the lowest priority of its token
        kept = place < self._max_states
        full = place == self._max_states - 1
        self._thresholds[tokens[full]] = priorities[full]
        states = torch.cat(self._states)[order[kept]]
        self._tokens, self._priorities, self._states = [tokens[kept]], [priorities[kept]], [states]
        self._buffered = 0


def gather_states(
    teacher: FrozenModel, sequences: Sequences, settings: SensesConfig, seed: int, world: World
) -> TokenStates:
    """Runs the teacher over all sequences and samples its states; every rank returns those of the tokens it owns.

    Token v belongs to rank v mod world_size.
    """
    reservoir = Reservoir(teacher.vocab_size, settings.max_states, teacher.hidden_size)
    priority_seed = derived_seed(seed, "senses", "priority")
    with progress_bar(total=sequences.num_tokens, label="gathering states", unit="tokens") as bar:
        for first, batch in rank_batches(sequences, settings.batch_size, world):
            hidden = teacher.hidden_states(batch.input_ids, batch.position_ids)
            sequence, position = batch.has_target.nonzero(as_tuple=True)
            priorities = random_bits(priority_seed, sequence + first, position)
            states = hidden[batch.has_target.to(hidden.device)]
            if settings.key == "predicted":
                tokens = predict(states, teacher.head_weight).cpu()
            else:
                tokens = batch.input_ids.roll(-1, dims=1)[batch.has_target]
            reservoir.add(*_route(tokens, priorities, states.to(torch.bfloat16).cpu(), world))
            bar.update(min(batch.num_tokens * world.world_size, bar.total - bar.n))
    return reservoir.finish()


def rank_batches(sequences: Sequences, batch_size: int, world: World) -> Iterator[tuple[int, TokenBatch]]:
    """Yields the batches of this rank, each with the number of its first sequence.

    Batches are dealt out in turn. Every rank gets equally many, since a forward pass under ZeRO-3 needs all ranks: one
    without work left gets a batch without targets.
    """
    starts = range(0, len(sequences), batch_size)
    for turn in range(-(-len(starts) // world.world_size)):
        number = turn * world.world_size + world.rank
        first = starts[number] if number < len(starts) else 0
        batch = sequences.batch(first, min(first + batch_size, len(sequences)))
        yield first, batch if number < len(starts) else batch.without_targets()


def predict(hidden: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """The most probable next token [N] behind each of the states [N, D]; logits exist for one chunk at a time."""
    parts = [F.linear(part, head_weight).argmax(-1) for part in hidden.split(_LOGITS_CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=hidden.device)


def _route(
    tokens: torch.Tensor, priorities: torch.Tensor, states: torch.Tensor, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sends each state to the rank that owns its token, and returns what this rank is sent."""
    if world.world_size == 1:
        return tokens, priorities, states
    owner = tokens % world.world_size
    order = owner.argsort(stable=True)
    sent = torch.bincount(owner, minlength=world.world_size)
    device = world.device
    received = _exchange(sent, [1] * world.world_size, [1] * world.world_size, device)
    splits = sent.tolist(), received.tolist()
    # bf16 travels as bytes: gloo does not know the type.
    bits = _exchange(states[order].view(torch.uint8), *splits, device)
    return (
        _exchange(tokens[order], *splits, device),
        _exchange(priorities[order], *splits, device),
        bits.view(torch.bfloat16),
    )


def _exchange(tensor: torch.Tensor, sent: list[int], received: list[int], device: torch.device) -> torch.Tensor:
    output = tensor.new_empty((sum(received), *tensor.shape[1:]), device=device)
    dist.all_to_all_single(output, tensor.to(device).contiguous(), received, sent)
    return output.cpu()
