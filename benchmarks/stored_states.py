"""How far zstd compresses the teacher's states in shards, and how fast it packs and unpacks them.

Reads the columns of states from shards that `launcher/annotate.py` wrote with `annotation.store`. By way of comparison
it also splits the numbers into planes of their first, second, … bytes, of which the first, with sign and exponent, are
much alike; the shards' format has no such planes:

    python -m benchmarks.stored_states --shards work/quickstart/shards/train
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import build_parser, machine, parse, publish
from dskd.artifacts.mds import INDEX, read_samples
from dskd.shards import TEACHER_STATES, TRUNK_STATES

_LEVELS = (1, 3)  # mosaicml-streaming's default is 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="folder of shards with states")
    parser.add_argument("--megabytes", type=int, default=64, help="of each column")
    args = parse(parser, arguments)
    at_start = machine()
    rows, results = [], {}
    for column, states in _read(args).items():
        width = states.dtype.itemsize
        planes = states.view(np.uint8).reshape(-1, width).T.tobytes()
        for name, data in ((column, states.tobytes()), (f"{column}, byte by byte", planes)):
            for level in _LEVELS:
                measured = results[f"{name}, zstd {level}"] = _measure(data, level)
                rows.append([name, f"{8 * width} bits", f"zstd {level}", *(f"{value:,.2f}" for value in measured)])
        copied = len(planes) / _seconds(lambda states=states: states.copy()) / 1e9
        results[f"{column}, copied"] = (1.0, copied, copied)
        rows.append([column, f"{8 * width} bits", "a copy in memory", "1.00", f"{copied:,.2f}", f"{copied:,.2f}"])
    header = ("states", "type", "packing", "packed / raw", "packed, GB/s", "unpacked, GB/s")
    publish(args, "benchmarks.stored_states", header, rows, results, at_start)


def _read(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns {column: its first values}, as many as were asked for."""
    pieces: dict[str, list[np.ndarray]] = {}
    sizes = dict.fromkeys((TEACHER_STATES, TRUNK_STATES), 0)
    for sample in read_samples(args.shards / INDEX):
        for column in sizes:
            if column in sample and sizes[column] < args.megabytes * 10**6:
                pieces.setdefault(column, []).append(sample[column].ravel())
                sizes[column] += sample[column].nbytes
        if all(size >= args.megabytes * 10**6 for size in sizes.values()):
            break
    return {column: np.concatenate(arrays) for column, arrays in pieces.items()}


def _measure(data: bytes, level: int) -> tuple[float, float, float]:
    """Returns the packed size by the raw size, and how many GB/s of raw data are packed and unpacked."""
    import zstd  # the library that mosaicml-streaming packs shards with

    packed = zstd.compress(data, level, 1)
    assert zstd.decompress(packed) == data
    pack, unpack = _seconds(lambda: zstd.compress(data, level, 1)), _seconds(lambda: zstd.decompress(packed))
    return len(packed) / len(data), len(data) / pack / 1e9, len(data) / unpack / 1e9


def _seconds(action: Callable[[], Any]) -> float:
    """Returns the shortest of three times."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main(sys.argv[1:])
