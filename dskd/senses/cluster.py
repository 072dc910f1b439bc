"""Sampled states of many tokens to their sense embeddings (docs/method.md, section 2)."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dskd.config import SensesConfig
from dskd.random_numbers import derived_seed
from dskd.senses.kmeans import groups, kmeans
from dskd.senses.reservoir import TokenStates


@dataclass(frozen=True)
class TokenSenses:
    """Sense embeddings of some tokens: m tokens, R rows in their order."""

    tokens: torch.Tensor  # [m], ascending
    sizes: torch.Tensor  # [m], rows of each
    vectors: torch.Tensor  # [R, D] bf16
    counts: torch.Tensor  # [R] int64, states behind each row


def senses_per_token(counts: torch.Tensor, settings: SensesConfig) -> torch.Tensor:
    """How many senses tokens with `counts` [m] states get: k, or one for each `states_per_sense` states up to k."""
    wanted = torch.full_like(counts, settings.k)
    if settings.states_per_sense is not None:
        wanted = torch.minimum(wanted, -(-counts // settings.states_per_sense))
    return torch.minimum(wanted, counts)


def cluster(
    states: TokenStates,
    settings: SensesConfig,
    seed: int,
    device: torch.device,
    weights: torch.Tensor | None = None,
) -> TokenSenses:
    """The sense embeddings of every token of `states`; a token with no more states than senses keeps them as they are.

    Args:
        states: of some tokens.
        settings: `k`, `states_per_sense`, `restarts`, `max_iterations`.
        seed: the experiment's.
        device: where to compute.
        weights: [n] int64, how many states each of them stands for; None is one.
    """
    if weights is None:
        weights = torch.ones(len(states.states), dtype=torch.int64)
    numbers = states.offsets.diff()
    sizes = torch.minimum(senses_per_token(_sum_by_token(weights, states.offsets), settings), numbers)
    offsets = F.pad(sizes.cumsum(0), (1, 0))
    vectors = torch.empty(int(offsets[-1]), states.states.shape[1], dtype=torch.bfloat16)
    counts = torch.empty(int(offsets[-1]), dtype=torch.int64)

    few = (numbers == sizes).nonzero().squeeze(-1)
    place, rows = ranges(offsets[few], sizes[few]), ranges(states.offsets[few], sizes[few])
    vectors[place], counts[place] = states.states[rows], weights[rows]

    many = (numbers > sizes).nonzero().squeeze(-1)
    cluster_seed = derived_seed(seed, "senses", "kmeans")
    for indices, width, k in groups(numbers[many], sizes[many], states.states.shape[1], device):
        chosen = many[indices]
        rows = states.offsets[chosen].unsqueeze(-1) + torch.arange(width)
        exists = rows < states.offsets[chosen + 1].unsqueeze(-1)
        rows = torch.where(exists, rows, 0)
        found = kmeans(
            states.states[rows].to(device),
            torch.where(exists, weights[rows], 0).to(device),
            k,
            seed=cluster_seed,
            keys=states.tokens[chosen],
            restarts=settings.restarts,
            max_iterations=settings.max_iterations,
        )
        place = ranges(offsets[chosen], sizes[chosen])
        vectors[place] = found.centers.flatten(0, 1).to(torch.bfloat16).cpu()
        counts[place] = found.counts.flatten().cpu()
    # Fewer different states than clusters leave clusters that nothing belongs to.
    used = counts > 0
    if not used.all():
        sizes = _sum_by_token(used.long(), offsets)
        vectors, counts = vectors[used], counts[used]
    return TokenSenses(states.tokens, sizes, vectors, counts)


def ranges(starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The integers starts[j] … starts[j] + sizes[j] - 1 for every j, end to end."""
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) + (starts - before).repeat_interleave(sizes)


def _sum_by_token(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return F.pad(values.cumsum(0), (1, 0))[offsets].diff()
