"""Sampling and clustering states at the size of a real model, within a memory budget: peak memory, disk and rate.

The states are random (V = 128 256, D = 4 096, as in Llama-3-8B); tokens are as frequent as words are (Zipf). Everything
else, except the teacher, is what `launcher/build_senses.py` runs on one rank:

    python -m benchmarks.gather_memory --folder FOLDER_WITH_SPACE --states 1000000 --budget 2
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import PeakMemory, build_parser, held_bytes, machine, parse, publish
from dskd.config import SensesConfig
from dskd.random_numbers import random_bits
from dskd.senses.assemble import write_part
from dskd.senses.cluster import cluster, senses_per_token
from dskd.senses.reservoir import Reservoir, SampledStates

_CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="a folder with free disk space; what is written there is removed"
    )
    parser.add_argument("--states", type=int, default=1_000_000, help="number of states to sample from")
    parser.add_argument("--budget", type=float, default=2.0, help="senses.memory_budget, in GB of 2^30 bytes")
    parser.add_argument("--max-states", type=int, default=100)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4096, help="states per batch")
    args = parse(parser, arguments)
    folder = args.folder / "gather_memory"
    folder.mkdir(parents=True)
    try:
        _run(args, folder)
    finally:
        shutil.rmtree(folder)


def _run(args: argparse.Namespace, folder: Path) -> None:
    random = np.random.default_rng(0)
    frequency = 1 / np.arange(1, args.vocab_size + 1)
    settings = SensesConfig(k=args.k, max_states=args.max_states, memory_budget=args.budget)
    budget = int(args.budget * 2**30)
    at_start = machine()
    start = held_bytes(_CPU)
    started = time.perf_counter()
    # Gathering: offer random states in batches. States that exceed the budget are written to sorted runs on disk.
    with PeakMemory(_CPU, beyond=start) as gathering:
        reservoir = Reservoir(args.vocab_size, args.max_states, args.hidden_size, budget, folder, "rank0of1")
        offered = 0
        pool = torch.randn(2 * args.batch, args.hidden_size).bfloat16()
        for first in range(0, args.states, args.batch):
            tokens = torch.from_numpy(random.choice(args.vocab_size, args.batch, p=frequency / frequency.sum()))
            priorities = random_bits(0, torch.arange(first, first + args.batch))
            kept = reservoir.can_enter(tokens, priorities)
            offset = int(random.integers(args.batch))
            reservoir.add(tokens[kept], priorities[kept], pool[offset : offset + args.batch][kept])
            offered += args.batch
        runs = [folder / name for name in reservoir.flush()]
        reservoir.remove_obsolete()
        del reservoir
    gathering_s = time.perf_counter() - started
    disk = sum(run.stat().st_size for run in runs)

    # Clustering: read the kept states back in ranges of tokens that fit the budget, and write the senses.
    started = time.perf_counter()
    with PeakMemory(_CPU, beyond=start) as clustering:
        sampled = SampledStates(runs, args.max_states)

        def senses():  # type: ignore[no-untyped-def]
            for states in sampled.ranges(budget // 5):
                yield cluster(states, settings, 0, _CPU)

        write_part(
            folder / "part.safetensors",
            sampled.tokens,
            senses_per_token(sampled.counts, settings),
            sampled.hidden_size,
            senses(),
        )
    clustering_s = time.perf_counter() - started
    num_kept = int(sampled.counts.sum())
    rows = [
        [
            f"gathering {offered:,} states",
            f"{offered / gathering_s:,.0f} states/s",
            f"{gathering.peak_bytes / 2**30:.2f}",
            f"{disk / 2**30:.2f} in {len(runs)} runs",
        ],
        [
            f"clustering the {num_kept:,} that were kept, of {len(sampled.tokens):,} tokens",
            f"{clustering_s:.0f} s",
            f"{clustering.peak_bytes / 2**30:.2f}",
            "",
        ],
    ]
    results = {
        "gathering": {"states_per_s": offered / gathering_s, "peak_bytes": gathering.peak_bytes, "disk_bytes": disk},
        "clustering": {"states": num_kept, "seconds": clustering_s, "peak_bytes": clustering.peak_bytes},
    }
    publish(args, "benchmarks.gather_memory", ("", "rate", "peak, GB", "on disk, GB"), rows, results, at_start)


if __name__ == "__main__":
    main(sys.argv[1:])
