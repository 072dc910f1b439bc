"""Batched k-means against scikit-learn's, on the same points: inertia and speed, in one run.

The points are the states of each token that `launcher/build_senses.py … senses.keep_states=true` sampled:

    python -m benchmarks.kmeans --states work/toy/.states.partial --k 5 10
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans

from benchmarks.report import build_parser, default_device, machine, parse, publish
from dskd.config import SensesConfig
from dskd.senses.cluster import cluster
from dskd.senses.csr import offsets_of
from dskd.senses.gather import read_progress
from dskd.senses.reservoir import SampledStates, TokenStates


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--states", type=Path, required=True, help="WORKDIR/.states.partial")
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--restarts", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--tokens", type=int, default=400, help="largest number of tokens whose states are clustered, drawn at random"
    )
    parser.set_defaults(threads=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device().type)
    args = parse(parser, arguments)
    runs = [args.states / run for run in read_progress(args.states).runs]
    if not runs:
        parser.error(
            f"--states {args.states}: this folder has no sampled states; build the senses with senses.keep_states=true"
        )
    (states,) = SampledStates(runs, 2**31).ranges(2**60)
    device = torch.device(args.device)
    at_start = machine()
    rows, results = [], []
    for k in args.k:
        chosen = _choose(states, k, args.tokens, args.seed)
        points = [part.float() for part in chosen.states.split(chosen.offsets.diff().tolist())]
        arrays = [part.numpy() for part in points]
        # scikit-learn clusters one token after the other; ours clusters all of them in one call.
        started = time.perf_counter()
        theirs = np.array([KMeans(k, n_init="auto", random_state=args.seed).fit(array).inertia_ for array in arrays])
        their_seconds = time.perf_counter() - started
        for restarts in args.restarts:
            settings = SensesConfig(k=k, restarts=restarts, max_iterations=300)  # scikit-learn's limit
            cluster(chosen, settings, args.seed, device)  # warm-up
            started = time.perf_counter()
            result = cluster(chosen, settings, args.seed, device)
            our_seconds = time.perf_counter() - started
            centers = result.vectors.split(result.sizes.tolist())
            ours = np.array([_inertia(*pair) for pair in zip(points, centers, strict=True)])
            is_positive = theirs > 0  # the inertia is 0 if a token has no more different points than clusters
            low, median, high = np.quantile(ours[is_positive] / theirs[is_positive], [0.1, 0.5, 0.9])
            figures = {"k": k, "restarts": restarts, "tokens": len(arrays), "points": len(chosen.states)}
            figures |= {"inertia": median, "low": low, "high": high, "speed": their_seconds / our_seconds}
            results.append(figures)
            rows.append(
                [
                    str(k),
                    str(restarts),
                    f"{len(arrays)}",
                    f"{median:.4f} [{low:.3f}, {high:.3f}]",
                    f"{figures['speed']:.1f}",
                ]
            )
    header = ("k", "restarts", "tokens", "median inertia [10 %, 90 %]", "times as fast")
    settings_of_all = {"hidden_size": states.states.shape[1], "results": results}
    publish(args, "benchmarks.kmeans", header, rows, settings_of_all, at_start)


def _choose(states: TokenStates, k: int, number: int, seed: int) -> TokenStates:
    """Returns the states of at most `number` tokens, drawn at random from those with more than k states."""
    many = (states.offsets.diff() > k).nonzero().squeeze(-1)
    many = many[torch.randperm(len(many), generator=torch.Generator().manual_seed(seed))[:number]].sort().values
    parts = [states.states[states.offsets[token] : states.offsets[token + 1]] for token in many]
    sizes = torch.tensor([len(part) for part in parts])
    return TokenStates(states.tokens[many], offsets_of(sizes), torch.cat(parts))


def _inertia(points: torch.Tensor, centers: torch.Tensor) -> float:
    """Returns the sum of squared distances to the nearest center, in float64, scikit-learn's definition of inertia."""
    return float(torch.cdist(points.double(), centers.double()).square().min(-1).values.sum())


if __name__ == "__main__":
    main(sys.argv[1:])
