"""The rate at which the data loader delivers the teacher's stored states, against a copy in memory.

    python -m benchmarks.loader --preset smollm2

No model is loaded: the program only takes the loader's steps, one after the other, as fast as they come. Each step has
the states of all its samples, compared with the hashes of the shards' index. The shards are read once before, so that
they are in the page cache; `torch.Tensor.copy_` of as many bytes, between two buffers that were written before, is the
control. Loaders with 1 and 2 workers take turns with it, and their rates are also given as shares of its rate.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.report import Spread, machine, parse, publish, ratios, take_turns
from benchmarks.workload import build_workload_parser, read_config, work_directory
from dskd.distributed.node_cache import open_node_cache
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.shards import TEACHER_STATES, TRUNK_STATES
from dskd.training.data.loader import load_steps
from dskd.training.data.packed_step import StepBatches
from dskd.training.inputs import build_collator, load_inputs
from dskd.training.schedule import plan_schedule

_COPY = "a copy in memory"
_WORKERS = (1, 2)
_STEPS = 40  # taken in each turn, of which up to four were prepared before it


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each loader and of the copy")
    args = parse(parser, arguments)
    args.states = True
    at_start = machine()
    with work_directory(args) as path:
        world = initialize()
        loaders: dict[str, Iterator[StepBatches]] = {}
        for workers in _WORKERS:
            config = read_config(path, args.overrides, "teacher.mode=cached", f"train.num_workers={workers}")
            inputs = load_inputs(config)
            schedule = plan_schedule(config, inputs.shards, world.world_size)
            collate = build_collator(config, inputs, schedule)
            cache = open_node_cache(config.train.shard_cache, world)
            loaders[f"loader, {workers} workers"] = load_steps(config, schedule, collate, cache, world, start_step=0)
        size = _take(next(iter(loaders.values())))
        source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
        work: dict[str, Callable[[], object]] = {
            name: functools.partial(_take_steps, loader) for name, loader in loaders.items()
        }
        work[_COPY] = lambda: [target.copy_(source) for _ in range(_STEPS)]
        seconds = take_turns(work, rounds=args.rounds)
        for loader in loaders.values():
            loader.close()  # type: ignore[attr-defined]
        shutdown()
    rates = {name: Spread.of(_STEPS * size / value / 1e9 for value in values) for name, values in seconds.items()}
    shares = {name: ratios(seconds, _COPY, name) for name in rates}
    rows = [[name, rate.text(".2f"), shares[name].text(".2f")] for name, rate in rates.items()]
    results: dict[str, Any] = {
        name: {"gb_per_s": rate.as_dict(), "of_copy": shares[name].as_dict()} for name, rate in rates.items()
    }
    publish(args, "benchmarks.loader", ("", "GB/s", "of the copy"), rows, results, at_start)


def _take_steps(loader: Iterator[StepBatches]) -> None:
    for _ in range(_STEPS):
        _take(loader)


def _take(loader: Iterator[StepBatches]) -> int:
    """Takes a step, and returns the number of bytes of its states."""
    batches = next(loader).micro_batches
    return sum(batch[name].nbytes for batch in batches for name in (TEACHER_STATES, TRUNK_STATES) if name in batch)


if __name__ == "__main__":
    main(sys.argv[1:])
