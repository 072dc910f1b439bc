"""The memory of a rank that `dskd plan` predicts, against what real training allocates, on 1, 2 and 4 ranks.

    python -m benchmarks.plan_memory
    python -m benchmarks.plan_memory train.activation_checkpointing=true --modes zero3 --ranks 2

Training is that of `launcher/train.py` without tracker and checkpoints: three steps of one micro-batch per rank. The
figure is the most memory that a rank's tensors hold at once. On a GPU, torch's allocator reports it. On a CPU it is
what the tensors hold when a step begins, plus what the allocator reports to the profiler within the step. The plan's
`reserved` is not included. On a CPU the ranks communicate over gloo.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.flops import Shape
from benchmarks.report import (
    build_parser,
    default_device,
    machine,
    parse,
    print_result,
    publish,
    run_ranks,
    storage_bytes,
)
from benchmarks.workload import OurTraining, Preset, read_config, write_work_directory
from dskd.distributed.collectives import gather_json
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.plan import GB
from dskd.plan.architecture import find_architecture
from dskd.plan.cluster import Cluster
from dskd.plan.plan import make_plan

_MODES = ("resident", "zero3", "cached")
_STEPS = 3  # from the second step on, ZeRO-3 gathers parameters ahead
# Large enough that tensors are nearly all that training holds, small enough for four ranks on two cores.
_PRESET = Preset(Shape(16_384, 1024, 3584, 8, 2, 6, 4, 2, 128), global_batch_size=16, micro_batch_size=4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--modes", choices=_MODES, nargs="+", default=list(_MODES), help="teacher.mode; cached: stored states"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
    parser.add_argument("--child", metavar="CONFIG", help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.child is not None:
        _measure(Path(args.child), args.overrides)
        return
    at_start = machine()
    rows, results = [], []
    with tempfile.TemporaryDirectory(prefix="dskd-benchmark-") as folder:
        write_work_directory(Path(folder), _PRESET, states=True)
        for mode in args.modes:
            for ranks in args.ranks:
                batch = f"train.global_batch_size={ranks * _PRESET.micro_batch_size}"
                options = [f"teacher.mode={mode}", "teacher.offload=none", batch, *args.overrides]
                figures = compare(Path(folder, "config.yaml"), ranks, options)
                results.append({"mode": mode, "ranks": ranks, **figures})
                rows.append(
                    [
                        mode,
                        str(ranks),
                        f"{figures['planned'] / 2**20:,.1f}",
                        f"{figures['measured'] / 2**20:,.1f}",
                        f"{figures['planned'] / figures['measured']:.3f}",
                        "within 10 %",
                    ]
                )
    header = ("teacher.mode", "ranks", "MB planned", "MB measured", "ratio", "goal")
    publish(args, "benchmarks.plan_memory", header, rows, {"sizes": results}, at_start)


def compare(path: Path, ranks: int, overrides: Sequence[str]) -> dict[str, int]:
    """Returns the peak bytes of a rank's tensors: planned, and measured on the rank that holds the most."""
    measured = run_ranks("benchmarks.plan_memory", ranks, "--child", path, *overrides)
    return {"planned": plan_bytes(path, ranks, overrides), "measured": max(measured)}


def plan_bytes(path: Path, ranks: int, overrides: Sequence[str]) -> int:
    """Returns the peak bytes of a rank's tensors according to the plan."""
    config = read_config(path, overrides)
    device = "cuda" if default_device().type == "cuda" else "cpu"
    cluster = Cluster(1, ranks, 80 * GB, 1000 * GB, device, GB, GB, GB, 1e12)  # the rates do not matter here
    return make_plan(config, cluster, find_architecture(config, None)).memory.gpu.tensors


def _measure(path: Path, overrides: Sequence[str]) -> None:
    config = read_config(path, overrides)
    world = initialize()
    training = OurTraining(config, world)
    peaks = []
    for _ in range(_STEPS):
        gc.collect()  # free reference cycles now, instead of at some point within the step
        peaks.append(_peak_of_a_step(training, world.device))
    of_all = gather_json(max(peaks))
    if world.is_main:
        print_result(of_all)
    training.close()
    shutdown()


def _peak_of_a_step(training: OurTraining, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        training.step()
        return torch.cuda.max_memory_allocated()
    held = _held_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training.step()
    return held + _largest_growth(profiler)


def _held_bytes() -> int:
    """Returns the bytes of all tensors of this process, between steps.

    The profiler's sums are not carried over from step to step, because they miss what gloo's threads free.
    """
    return storage_bytes(thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))


def _largest_growth(profiler: Any) -> int:
    """Returns the largest sum of allocations and releases since the profile began, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most


if __name__ == "__main__":
    main(sys.argv[1:])
