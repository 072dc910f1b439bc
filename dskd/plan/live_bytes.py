"""Counting the bytes of tensors that are alive at once while a computation runs on shapes, without memory."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A counter of the storages that operations inside it allocate, each from its creation until nothing refers to it.

    Views share a storage. Storages that existed before, such as weights, do not count. Memory that an operation only
    uses internally is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it returns."""
        if func is torch.ops.aten.nonzero.default:
            # The size of the result depends on data, which does not exist; assume the largest, where all are nonzero.
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        result = func(*args, **(kwargs or {}))
        existing = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in existing:
                self._count(leaf.untyped_storage())
        return result

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Excludes what is allocated within from the current count, because it is counted elsewhere."""
        before = self.now
        yield
        self.now = before

    def restart_peak(self) -> int:
        """Returns the peak since the last call, and starts the next peak from the bytes that are alive now."""
        peak, self.peak = self.peak, self.now
        return peak

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive or not storage.nbytes():
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
