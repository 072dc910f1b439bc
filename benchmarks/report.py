"""Code that all benchmarks share: arguments, timing in turns, peak memory, and results that name their machine.

Speeds and sizes are compared only within one run, in which variants take turns, so that other work on the machine
affects all of them equally.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dskd.artifacts.manifest import write_json
from dskd.console import table
from dskd.distributed.rendezvous import free_port
from dskd.distributed.world import LAUNCHER_VARIABLES, uses_gpu

REPOSITORY = Path(__file__).resolve().parent.parent
_IDLE_LOAD = 0.3  # highest load of an idle machine
_RESULT_MARK = "result: "  # begins the line on which a child process prints its result


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Builds a parser with the options of every benchmark: the file for its result, and torch's threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the result to this file, as JSON")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU; default: one per core")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses `arguments` (None: the command line's), and sets the threads of this process and its children."""
    args = parser.parse_intermixed_args(arguments)
    if args.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)
    return args


def default_device() -> torch.device:
    """Returns the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if uses_gpu() else "cpu")


def machine() -> dict[str, Any]:
    """Returns the date and the properties of the machine and its software, on which a figure depends."""
    device = default_device()
    is_cuda = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # over the last minute; 0 on an idle machine
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def publish(
    args: argparse.Namespace,
    module: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    results: Mapping[str, Any],
    at_start: Mapping[str, Any],
) -> None:
    """Prints the table, and writes it with `results`, the command and the machine to the file of `--output`.

    Args:
        args: the benchmark's arguments.
        module: `benchmarks.NAME`.
        header: the table's header.
        rows: the table's rows.
        results: the same results as numbers.
        at_start: :func:`machine` before the measurement, because afterwards the load includes the benchmark's own.
    """
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    print(f"\n{command}")
    print(", ".join(f"{name} {value}" for name, value in at_start.items()))
    if at_start["load"] > _IDLE_LOAD:
        print("other work was running on this machine: it slows some variants more than others, which distorts ratios")
    print(table(header, rows), flush=True)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        table_of_output = {"header": list(header), "rows": [list(row) for row in rows]}
        write_json(
            args.output,
            {"command": command, "machine": dict(at_start), "table": table_of_output, "results": dict(results)},
        )


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Computes the spread of some values; that of a single value has width 0."""
        values = sorted(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)

    def text(self, form: str = ".3f", scale: float = 1) -> str:
        """Returns `median [low, high]` as text."""
        return f"{self.median * scale:{form}} [{self.low * scale:{form}}, {self.high * scale:{form}}]"

    def as_dict(self) -> dict[str, float]:
        """Returns the spread as a dictionary for JSON."""
        return asdict(self)


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the seconds of each variant in each round; with `time.process_time` as `clock`, those of the processor.

    Every variant runs once in each round, in reverse order in every second round. The first `warm_up` rounds are not
    counted. `clock` returns seconds.
    """
    device = device or default_device()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        names = list(variants)
        for name in names if number % 2 == 0 else reversed(names):
            _synchronize(device)
            started = clock()
            variants[name]()
            _synchronize(device)
            if number >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> Spread:
    """Returns the spread of the ratios of two variants, round by round, so that what slows a round cancels out."""
    return Spread.of(one / other for one, other in zip(seconds[of], seconds[to], strict=True))


class PeakMemory:
    """A context manager that sets `peak_bytes` to the peak memory of its block, in bytes beyond a start value.

    On a GPU it is the memory that torch allocated. On a CPU it is the anonymous memory of this process, read every two
    milliseconds: mapped files, shards and libraries do not count, because their pages can be dropped at any time.
    """

    def __init__(self, device: torch.device, *, beyond: int | None = None) -> None:
        """Sets the start value: `beyond` bytes, or the memory held on entry."""
        self._device = device
        self._before = beyond
        self._peak = 0
        self._ended = threading.Event()
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        self._before = held_bytes(self._device) if self._before is None else self._before
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._watch = threading.Thread(target=self._sample, daemon=True)
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        if self._device.type == "cuda":
            _synchronize(self._device)
            self._peak = torch.cuda.max_memory_allocated()
        else:
            self._ended.set()
            self._watch.join()
        self.peak_bytes = self._peak - self._before

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, held_bytes(self._device))
            if self._ended.wait(0.002):
                return


def held_bytes(device: torch.device) -> int:
    """Returns the bytes that torch has allocated on a GPU, or the anonymous memory of this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the memory of this process cannot be measured: /proc/self/status has no RssAnon on this system")


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes that tensors occupy; memory that several of them share is counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# The C allocator keeps freed memory, so a process seems to hold what it no longer uses. With these variables it returns
# large blocks at once. That takes time, so they are only for processes that measure memory, not speed.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}


def run_child(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:
    """Runs a benchmark's module in a child process, and returns what it passes to :func:`print_result`.

    The child is a rank of its own: it does not get the variables of the job that this process may have become, whose
    port this process still holds.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    finished = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        | dict(environment or {}),
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    return parse_result(command, finished.returncode, finished.stdout)


def run_ranks(module: str, ranks: int, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:
    """Runs a benchmark's module on `ranks` ranks of this machine, as a launcher does, and returns rank 0's result."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        of_rank = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, **(environment or {}), **of_rank},
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    return parse_result(command, max(process.returncode for process in processes), outputs[0])


def parse_result(command: Sequence[str], exit_code: int, output: str) -> Any:
    """Returns the result in a child process's output.

    Raises:
        SystemExit: when the child failed or printed no result; the message has the child's output.
    """
    lines = [line for line in output.splitlines() if line.startswith(_RESULT_MARK)]
    if exit_code or not lines:
        raise SystemExit(f"{shlex.join(command)} ended with exit code {exit_code}:\n{output}")
    return json.loads(lines[-1].removeprefix(_RESULT_MARK))


def print_result(result: Any) -> None:
    """Prints a JSON-like result for the parent of this process."""
    print(f"\n{_RESULT_MARK}{json.dumps(result)}", flush=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def processor() -> str:
    """Returns the name of the machine's processor."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()
