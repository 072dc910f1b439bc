"""Batched k-means against scikit-learn's, on the same clouds: inertia and speed, in one run.

The clouds are the states that `launcher/build_senses.py … senses.keep_states=true` sampled, one of each token:

    python benchmarks/kmeans.py --states work/quickstart/.states.partial --k 5 10
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch.nn import functional as F

from dskd.config import SensesConfig
from dskd.senses.cluster import cluster
from dskd.senses.gather import read_progress
from dskd.senses.reservoir import SampledStates, TokenStates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, required=True, help="WORKDIR/.states.partial")
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--restarts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=400, help="clouds at most, drawn at random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs = [given.states / run for run in read_progress(given.states).runs]
    if not runs:
        parser.error(f"{given.states}: there are no sampled states here")
    (states,) = SampledStates(runs, 2**31).ranges(2**60)
    device = torch.device(given.device)
    print(f"{given.device}, {given.threads} threads, torch {torch.__version__}; D = {states.states.shape[1]}")
    print("inertia: ours / scikit-learn's, median [10 %, 90 %] over clouds; speed: scikit-learn's seconds / ours")
    for k in given.k:
        clouds = _choose(states, k, given.tokens, given.seed)
        points = [part.float() for part in clouds.states.split(clouds.offsets.diff().tolist())]
        arrays = [part.numpy() for part in points]
        started = time.perf_counter()
        theirs = np.array([KMeans(k, n_init="auto", random_state=given.seed).fit(array).inertia_ for array in arrays])
        their_seconds = time.perf_counter() - started
        for restarts in given.restarts:
            settings = SensesConfig(k=k, restarts=restarts, max_iterations=300)  # scikit-learn's limit
            cluster(clouds, settings, given.seed, device)  # warm
            started = time.perf_counter()
            found = cluster(clouds, settings, given.seed, device)
            our_seconds = time.perf_counter() - started
            centers = found.vectors.split(found.sizes.tolist())
            ours = np.array([_inertia(*pair) for pair in zip(points, centers, strict=True)])
            real = theirs > 0  # a cloud with no more different points than clusters says nothing
            low, median, high = np.quantile(ours[real] / theirs[real], [0.1, 0.5, 0.9])
            print(
                f"k = {k}, {restarts} restarts, {len(arrays)} clouds of {len(clouds.states)} points: "
                f"inertia {median:.4f} [{low:.4f}, {high:.4f}], "
                f"speed {their_seconds / our_seconds:.1f} ({their_seconds:.2f} s / {our_seconds:.2f} s)"
            )


def _choose(states: TokenStates, k: int, number: int, seed: int) -> TokenStates:
    """At most `number` tokens that have more than k states."""
    many = (states.offsets.diff() > k).nonzero().squeeze(-1)
    many = many[torch.randperm(len(many), generator=torch.Generator().manual_seed(seed))[:number]].sort().values
    parts = [states.states[states.offsets[token] : states.offsets[token + 1]] for token in many]
    sizes = torch.tensor([len(part) for part in parts])
    return TokenStates(states.tokens[many], F.pad(sizes.cumsum(0), (1, 0)), torch.cat(parts))


def _inertia(points: torch.Tensor, centers: torch.Tensor) -> float:
    """Recomputed in float64, for both sides alike in what it means."""
    return float(torch.cdist(points.double(), centers.double()).square().min(-1).values.sum())


if __name__ == "__main__":
    main()
