"""The size of the teacher's states when zstd packs them in shards, and the rates of packing and unpacking.

Reads the columns of states from shards that `launcher/annotate.py` wrote with `annotation.store`, and writes their
samples once more as shards, compressed and not. By way of comparison it also compresses planes of the numbers' first,
second, … bytes, of which the first, with sign and exponent, are much alike; the shards' format has no such planes:

    python -m benchmarks.stored_states --shards work/toy/shards/train
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import build_parser, machine, parse, publish
from dskd.artifacts.mds import INDEX, read_index, read_samples
from dskd.shards import TEACHER_STATES, TRUNK_STATES
from dskd.shards.writing import write_block

_LEVELS = (1, 3)  # mosaicml-streaming's default is 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="folder of shards with states")
    parser.add_argument("--megabytes", type=int, default=128, help="of samples")
    args = parse(parser, arguments)
    at_start = machine()
    rows: list[list[str]] = []
    results: dict[str, tuple[float, ...]] = {}
    samples = _read(args)
    for column in sorted({TEACHER_STATES, TRUNK_STATES} & set(samples[0])):
        for states in _types(np.concatenate([sample[column].ravel() for sample in samples])):
            width = states.dtype.itemsize
            planes = states.view(np.uint8).reshape(-1, width).T.tobytes()
            for packing, data in (("zstd", states.tobytes()), ("planes, zstd", planes)):
                for level in _LEVELS:
                    results[f"{column}, {8 * width} bits, {packing} {level}"] = measured = _measure(data, level)
                    rows.append(
                        [column, f"{8 * width}", f"{packing} {level}", *(f"{value:,.2f}" for value in measured)]
                    )
            copied = len(planes) / _seconds(lambda states=states: states.copy()) / 1e9
            rows.append([column, f"{8 * width}", "a copy in memory", "1.00", f"{copied:,.2f}", f"{copied:,.2f}"])
    for packing in (None, "zstd"):
        share, rate = results[f"shards, {packing}"] = _write(args.shards, samples, packing)
        rows.append(["all columns", "", f"shards, {packing or 'not packed'}", f"{share:.2f}", f"{rate:,.2f}", ""])
    header = ("states", "bits", "packing", "packed / raw", "packed, GB/s", "unpacked, GB/s")
    publish(args, "benchmarks.stored_states", header, rows, results, at_start)


def _read(args: argparse.Namespace) -> list[dict[str, np.ndarray]]:
    """Returns the first samples, of as many bytes as were asked for."""
    samples: list[dict[str, np.ndarray]] = []
    size = 0
    for sample in read_samples(args.shards / INDEX):
        samples.append(sample)
        size += sum(column.nbytes for column in sample.values())
        if size >= args.megabytes * 10**6:
            break
    return samples


def _types(states: np.ndarray) -> list[np.ndarray]:
    """Returns the states, and if they are float32 also the raw bits of the nearest bf16."""
    if states.dtype != np.float32:
        return [states]
    return [states, torch.from_numpy(states).bfloat16().view(torch.uint16).numpy()]


def _write(shards: Path, samples: list[dict[str, np.ndarray]], packing: str | None) -> tuple[float, float]:
    """Returns the size of samples as shards by the size of their arrays, and how many GB/s of arrays are written."""
    like = read_index(shards / INDEX)[0]
    encodings = dict(zip(like["column_names"], like["column_encodings"], strict=True))
    with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
        started = time.process_time()
        write_block(Path(folder) / "block", samples, encodings, compression=packing)
        seconds = time.process_time() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.mds*"))
    raw = sum(column.nbytes for sample in samples for column in sample.values())
    return size / raw, raw / seconds / 1e9


def _measure(data: bytes, level: int) -> tuple[float, float, float]:
    """Returns the packed size by the raw size, and how many GB/s of raw data are packed and unpacked."""
    import zstd  # the library that mosaicml-streaming packs shards with

    packed = zstd.compress(data, level, 1)
    assert zstd.decompress(packed) == data
    pack, unpack = _seconds(lambda: zstd.compress(data, level, 1)), _seconds(lambda: zstd.decompress(packed))
    return len(packed) / len(data), len(data) / pack / 1e9, len(data) / unpack / 1e9


def _seconds(action: Callable[[], Any]) -> float:
    """Returns the shortest of three times, of this process alone: it does not grow if others run on the machine."""
    times = []
    for _ in range(3):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


if __name__ == "__main__":
    main(sys.argv[1:])
