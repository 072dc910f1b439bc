"""Bytes of the teacher that each rank holds, on 1, 2 and 4 ranks: resident, and partitioned by ZeRO-3.

    python -m benchmarks.teacher_memory
    python -m benchmarks.teacher_memory --ranks 1 2 4 8 --preset 8b     # on as many GPUs

The count includes parameters, shares of parameters and buffers, with the output matrix, after loading and again after a
forward pass. On a CPU the ranks communicate over gloo.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, parse, print_result, publish, run_ranks, storage_bytes
from benchmarks.workload import build_workload_parser, load_teacher, read_config, teacher_tensors, work_directory
from dskd.distributed.collectives import gather_json
from dskd.distributed.rendezvous import initialize, shutdown

_MODES = ("resident", "zero3")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--child", metavar="CONFIG", help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.child is not None:
        _measure(Path(args.child), args.overrides)
        return
    at_start = machine()
    rows, results = [], []
    with work_directory(args) as path:
        for mode in _MODES:
            whole = 0.0
            for ranks in args.ranks:
                options = [*args.overrides, f"teacher.mode={mode}", "teacher.offload=none"]
                held = run_ranks("benchmarks.teacher_memory", ranks, "--child", path, *options)
                most = max(rank["loaded"] for rank in held)
                whole = whole or most * (ranks if mode == "zero3" else 1)
                results.append({"mode": mode, "ranks": ranks, "bytes": held, "share": most / whole})
                rows.append(
                    [
                        mode,
                        str(ranks),
                        f"{most / 2**20:,.1f}",
                        f"{most / whole:.3f}",
                        f"{1 / ranks:.3f} within 5 %" if mode == "zero3" else "",
                        f"{max(rank['after_forward'] for rank in held) / 2**20:,.1f}",
                    ]
                )
    header = ("mode", "ranks", "MB a rank", "share", "goal", "after a forward pass")
    publish(args, "benchmarks.teacher_memory", header, rows, {"sizes": results}, at_start)


def _measure(path: Path, overrides: Sequence[str]) -> None:
    config = read_config(path, overrides)
    world = initialize()
    teacher = load_teacher(config, world)
    result: dict[str, Any] = {"loaded": storage_bytes(teacher_tensors(teacher))}
    teacher.hidden_states(torch.arange(8)[None])
    result["after_forward"] = storage_bytes(teacher_tensors(teacher))
    of_all = gather_json(result)
    if world.is_main:
        print_result(of_all)
    teacher.close()
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
