"""The share of a step's time that each kind of operation takes, from torch's profiler."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import default_device

# Parts of operations' names by kind; an operation belongs to the first kind with a part that its name contains.
_KINDS = {
    "attention": ("attention", "flash", "fmha"),
    "matrix products": ("mm", "gemm", "linear", "matmul", "cutlass", "nvjet"),
    "softmax and losses": ("softmax", "logsumexp", "exp", "nll", "cross_entropy", "kl_div", "div", "log", "sum", "max"),
    "copies and casts": ("copy", "cat", "memcpy", "memset", "fill", "zero", "clone", "contiguous"),
    "rows by index": ("index", "gather", "scatter", "embedding", "topk", "sort"),
}
_REST, _NO_OPERATION = "other operations", "outside of operations (Python, waiting)"


class Profile:
    """A profile of the code that runs between `start` and `stop`."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.is_cuda = default_device().type == "cuda"
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.is_cuda]
        self._profiler: Any = profile(activities=activities, acc_events=True)

    def start(self) -> None:
        """Starts profiling."""
        self._profiler.start()
        self._started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Stops profiling and returns the share of the elapsed time of each kind of operation, the largest first.

        On a CPU an operation's time is its own time, without operations inside it, on the calling thread; on a GPU it
        is the time of its kernels.
        """
        if self.is_cuda:
            torch.cuda.synchronize()
        self._elapsed_us = (time.perf_counter() - self._started) * 1e6
        self._profiler.stop()
        spent: Counter[str] = Counter()
        for event in self._profiler.key_averages():
            own = event.self_device_time_total if self.is_cuda else event.self_cpu_time_total
            spent[kind_of(event.key)] += own / self._elapsed_us
        spent[_NO_OPERATION] = max(0.0, 1 - sum(spent.values()))
        return dict(spent.most_common())

    def events(self) -> list[Any]:
        """Returns torch's events of the host: operations and ranges, each with the one around it (`cpu_parent`)."""
        from torch.autograd import DeviceType

        return [event for event in self._profiler.events() if event.device_type == DeviceType.CPU]

    def own_share(self, event: Any) -> float:
        """Returns the share of the elapsed time that an event takes itself: on a GPU in the kernels it starts."""
        own = sum(kernel.duration for kernel in event.kernels) if self.is_cuda else event.self_cpu_time_total
        return float(own / self._elapsed_us)

    def kernels(self, is_wanted: Callable[[Any], bool]) -> list[str]:
        """Returns the names of the GPU's kernels that wanted events of the host start, the longest first."""
        spent: Counter[str] = Counter()
        for event in self.events():
            if event.kernels and is_wanted(event):
                for kernel in event.kernels:
                    spent[kernel.name] += kernel.duration
        return [name for name, _ in spent.most_common()]

    def table(self) -> str:
        """Returns a table of the 25 operations that take the most time."""
        order = "self_cuda_time_total" if self.is_cuda else "self_cpu_time_total"
        return self._profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def profile_steps(step: Callable[[], object]) -> tuple[dict[str, float], str]:
    """Profiles two steps after two others; returns the shares by kind, and the table of operations."""
    for _ in range(2):
        step()
    profile = Profile()
    profile.start()
    for _ in range(2):
        step()
    return profile.stop(), profile.table()


def kind_of(operation: str) -> str:
    """Returns the kind of an operation or a kernel, by its name."""
    name = operation.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), _REST)


def shares_text(shares: dict[str, float]) -> str:
    """Returns one line for each kind with a share of at least 0.5 %."""
    return "\n".join(f"{share:7.1%}  {kind}" for kind, share in shares.items() if share >= 0.005)
