"""Sampling and clustering states at the size of a real model, within a memory budget: peak memory, disk and rate.

The states are random (V = 128 256, D = 4 096, as Llama-3-8B has them); tokens are as frequent as words are (Zipf).
Everything else is what `launcher/build_senses.py` runs on one rank, but for the teacher:

    python benchmarks/gather_memory.py --folder FOLDER_WITH_SPACE --states 1000000 --budget 2
"""

import argparse
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dskd.config import SensesConfig
from dskd.random_numbers import random_bits
from dskd.senses.assemble import write_part
from dskd.senses.cluster import cluster, senses_per_token
from dskd.senses.reservoir import Reservoir, SampledStates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="an empty place on disk; what is written is removed")
    parser.add_argument("--states", type=int, default=1_000_000, help="states that are offered")
    parser.add_argument("--budget", type=float, default=2.0, help="senses.memory_budget, in GB of 2^30 bytes")
    parser.add_argument("--max-states", type=int, default=100)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4096, help="states offered at one time")
    given = parser.parse_args()
    folder = given.folder / "gather_memory"
    folder.mkdir(parents=True)
    try:
        _run(given, folder)
    finally:
        shutil.rmtree(folder)


def _run(given: argparse.Namespace, folder: Path) -> None:
    random = np.random.default_rng(0)
    frequency = 1 / np.arange(1, given.vocab_size + 1)
    settings = SensesConfig(k=given.k, max_states=given.max_states, memory_budget=given.budget)
    budget = int(given.budget * 2**30)
    print(f"V = {given.vocab_size:,}, D = {given.hidden_size:,}, {given.states:,} states, budget {given.budget} GB")
    watch = Watch()
    reservoir = Reservoir(given.vocab_size, given.max_states, given.hidden_size, budget, folder, "rank0of1")
    offered, started = 0, time.perf_counter()
    pool = torch.randn(2 * given.batch, given.hidden_size).bfloat16()
    for first in range(0, given.states, given.batch):
        tokens = torch.from_numpy(random.choice(given.vocab_size, given.batch, p=frequency / frequency.sum()))
        priorities = random_bits(0, torch.arange(first, first + given.batch))
        wanted = reservoir.wanted(tokens, priorities)
        start = int(random.integers(given.batch))
        reservoir.add(tokens[wanted], priorities[wanted], pool[start : start + given.batch][wanted])
        offered += given.batch
    runs = [folder / name for name in reservoir.flush()]
    reservoir.remove_obsolete()
    seconds = time.perf_counter() - started
    disk = sum(run.stat().st_size for run in runs) / 2**30
    print(
        f"gathering:  {offered / seconds:,.0f} states/s; peak {watch.peak_gb():.2f} GB; "
        f"{disk:.2f} GB on disk in {len(runs)} runs"
    )
    del reservoir

    started = time.perf_counter()
    sampled = SampledStates(runs, given.max_states)

    def senses():  # type: ignore[no-untyped-def]
        for states in sampled.ranges(budget // 5):
            yield cluster(states, settings, 0, torch.device("cpu"))

    write_part(
        folder / "part.safetensors",
        sampled.tokens,
        senses_per_token(sampled.counts, settings),
        sampled.hidden_size,
        senses(),
    )
    kept = int(sampled.counts.sum())
    seconds = time.perf_counter() - started
    print(
        f"clustering: {kept:,} states of {len(sampled.tokens):,} tokens in {seconds:.0f} s; "
        f"peak {watch.peak_gb():.2f} GB"
    )


class Watch:
    """The most memory this process has held since the last question, beyond what it held at first."""

    def __init__(self) -> None:
        self._before = self._peak = _anonymous_gb()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._peak = max(self._peak, _anonymous_gb())
            time.sleep(0.01)

    def peak_gb(self) -> float:
        """GB of 2^30 bytes."""
        peak, self._peak = self._peak - self._before, _anonymous_gb()
        return peak


def _anonymous_gb() -> float:
    """Memory of this process that no file stands behind: pages of mapped files can be dropped at any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("this system does not say how much memory a process has (RssAnon)")


if __name__ == "__main__":
    main()
