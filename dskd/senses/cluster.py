"""Clusters the sampled states of many tokens into sense embeddings (docs/method.md, section 2)."""

from dataclasses import dataclass

import torch

from dskd.config import SensesConfig
from dskd.random_numbers import derived_seed
from dskd.senses.csr import offsets_of, padded_ranges, ranges, sums_of_lists
from dskd.senses.kmeans import groups, kmeans
from dskd.senses.reservoir import TokenStates

CLUSTER_SETTINGS = ("k", "states_per_sense", "restarts", "max_iterations")  # the keys of `senses` that clustering reads


@dataclass(frozen=True)
class TokenSenses:
    """The sense embeddings of some tokens: m tokens and their R rows, in the order of the tokens."""

    tokens: torch.Tensor  # [m], ascending
    sizes: torch.Tensor  # [m], number of rows of each token
    vectors: torch.Tensor  # [R, D] bf16
    counts: torch.Tensor  # [R] int64, number of states that each row represents


def senses_per_token(counts: torch.Tensor, settings: SensesConfig) -> torch.Tensor:
    """Returns the number of senses [m] of tokens with `counts` [m] states.

    It is k, or one per `states_per_sense` states up to k if that is set; and never more than the token's states.
    """
    numbers = counts.clamp(max=settings.k)
    if settings.states_per_sense is not None:
        numbers = numbers.minimum(-(-counts // settings.states_per_sense))
    return numbers


def cluster(
    states: TokenStates,
    settings: SensesConfig,
    seed: int,
    device: torch.device,
    weights: torch.Tensor | None = None,
) -> TokenSenses:
    """Computes the sense embeddings of every token of `states`, which has n states in all, with k-means on `device`.

    If a token has no more states than senses, its states become its senses, unchanged. `weights` [n] int64 is how many
    states each row of `states` represents; None means one each.
    """
    if weights is None:
        weights = torch.ones(len(states.states), dtype=torch.int64)
    numbers = states.offsets.diff()
    sizes = torch.minimum(senses_per_token(sums_of_lists(weights, states.offsets), settings), numbers)
    offsets = offsets_of(sizes)
    vectors = torch.empty(int(offsets[-1]), states.states.shape[1], dtype=torch.bfloat16)
    counts = torch.empty(int(offsets[-1]), dtype=torch.int64)

    # Tokens with no more states than senses: copy the states.
    few = (numbers == sizes).nonzero().squeeze(-1)
    targets, rows = ranges(offsets[few], sizes[few]), ranges(states.offsets[few], sizes[few])
    vectors[targets], counts[targets] = states.states[rows], weights[rows]

    # All other tokens: k-means, for groups of tokens that have equal k and about the same number of states. The states
    # of each token are padded to `width`; padding has weight 0.
    many = (numbers > sizes).nonzero().squeeze(-1)
    cluster_seed = derived_seed(seed, "senses", "kmeans")
    for indices, width, k in groups(numbers[many], sizes[many], states.states.shape[1], device):
        chosen = many[indices]
        rows, exists = padded_ranges(states.offsets[chosen], numbers[chosen], width)
        clusters = kmeans(
            states.states[rows].to(device),
            torch.where(exists, weights[rows], 0).to(device),
            k,
            seed=cluster_seed,
            keys=states.tokens[chosen],
            restarts=settings.restarts,
            max_iterations=settings.max_iterations,
        )
        targets = ranges(offsets[chosen], sizes[chosen])
        vectors[targets] = clusters.centers.flatten(0, 1).to(torch.bfloat16).cpu()
        counts[targets] = clusters.counts.flatten().cpu()
    # A token with fewer distinct states than clusters has empty clusters: drop them.
    used = counts > 0
    if not used.all():
        sizes = sums_of_lists(used.long(), offsets)
        vectors, counts = vectors[used], counts[used]
    return TokenSenses(states.tokens, sizes, vectors, counts)
