"""A simulation of what ZeRO-3 gathers while a model runs: how many elements are gathered at once, and how
many are sent.

It follows DeepSpeed's coordinator. Before a module runs, its weights are gathered, and then those of the next modules,
about `PREFETCHED` elements at a time, while no more than `MAX_LIVE` elements are whole. After the module has run, its
weights are released unless they are needed again within the next `MAX_REUSE_DISTANCE` elements. Weights that are
gathered together arrive in one buffer, from which each is copied; they exist twice until the last of them is used.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dskd.models.structure.causal_lm import MAX_LIVE, MAX_REUSE_DISTANCE, PREFETCHED
from dskd.plan.shapes import Shapes, Weight


@dataclass(frozen=True)
class Gathered:
    """The numbers of gathered elements in one pass over a micro-batch."""

    along: tuple[int, ...]  # held while each module runs forward
    at_turn: int  # held after the last module has run forward, while the loss is computed
    backward: int  # the most that are held in the backward pass
    travelled: int  # gathered in total, counted each time

    @property
    def forward(self) -> int:
        """Returns the most elements that are held in the forward pass."""
        return max(self.along, default=0)


@functools.lru_cache(maxsize=256)
def gather(shapes: Shapes, *, persistent: int, backward: bool, is_gloo: bool = False) -> Gathered:
    """Simulates what is gathered in a forward pass and, with `backward`, in its backward pass over the same modules in
    reverse.

    Weights with at most `persistent` elements stay gathered and are not counted. `is_gloo`: ranks communicate over
    gloo, as they do without GPUs, which has its own buffer for all data that is being sent.
    """
    # Modules that contain others have no weights, but they also prefetch. Training wraps the model in one more.
    uses: list[list[Weight]] = [[]]
    uses += [[weight for weight in module if weight.numel > persistent] for module in shapes.modules]
    turn = len(uses)
    uses += reversed(uses) if backward else []
    coordinator = _Coordinator(uses, is_gloo=is_gloo)
    along = [coordinator.run(number) for number in range(turn)]
    at_turn = coordinator.held()
    returning = [coordinator.run(number) for number in range(turn, len(uses))]
    return Gathered(tuple(along), at_turn, max(returning, default=0), coordinator.travelled)


class _Coordinator:
    def __init__(self, uses: Sequence[Sequence[Weight]], *, is_gloo: bool) -> None:
        self._uses = uses
        self._is_gloo = is_gloo
        self._ahead = deque((number, weight) for number, use in enumerate(uses) for weight in use)
        self._fetched_for: dict[str, int] = {}  # weight -> the last use that it was prefetched for
        self._available: dict[str, int] = {}  # weight -> its elements; gathered, or at least requested
        self._buffers: list[_Buffer] = []
        self.travelled = 0

    def run(self, number: int) -> int:
        """Runs one module, and returns the most elements that were held, including buffers."""
        use = self._uses[number]
        names = {weight.name for weight in use}
        self._gather([weight for weight in use if weight.name not in self._available])
        for buffer in self._buffers:
            if buffer.unused & names:  # the module waits for the buffer, and all of its weights are copied out
                buffer.is_copied = True
        peak = self.held()
        for buffer in self._buffers:
            buffer.unused -= names
        self._buffers = [buffer for buffer in self._buffers if buffer.unused]
        while self._ahead and self._ahead[0][0] <= number:
            self._ahead.popleft()
        self._prefetch()
        peak = max(peak, self.held())
        for weight in use:
            if self._fetched_for.get(weight.name, number) <= number and not self._is_needed_soon(weight, number):
                self._available.pop(weight.name, None)
        return peak

    def _prefetch(self) -> None:
        room = min(MAX_LIVE - sum(self._available.values()), PREFETCHED)
        chosen: list[Weight] = []
        while self._ahead and sum(weight.numel for weight in chosen) < room:
            number, weight = self._ahead.popleft()
            self._fetched_for[weight.name] = max(number, self._fetched_for.get(weight.name, 0))
            if weight.name not in self._available and weight not in chosen:
                chosen.append(weight)
        self._gather(chosen)

    def _gather(self, weights: Sequence[Weight]) -> None:
        self._available.update((weight.name, weight.numel) for weight in weights)
        numel = sum(weight.numel for weight in weights)
        self.travelled += numel
        if len(weights) > 1:  # a single weight is received in place, without a buffer
            self._buffers.append(_Buffer({weight.name for weight in weights}, numel))

    def _is_needed_soon(self, weight: Weight, number: int) -> bool:
        passed = 0
        for use in self._uses[number + 1 :]:
            if passed >= MAX_REUSE_DISTANCE:
                return False
            if weight in use:
                return True
            passed += sum(other.numel for other in use)
        return False

    def held(self) -> int:
        """Returns the number of elements that are held now, including buffers."""
        waiting = {name for buffer in self._buffers if not buffer.is_copied for name in buffer.unused}
        whole = sum(numel for name, numel in self._available.items() if name not in waiting)
        under_way = sum(buffer.numel for buffer in self._buffers if not buffer.is_copied) * self._is_gloo
        return whole + sum(buffer.numel for buffer in self._buffers) + under_way


@dataclass
class _Buffer:
    """A buffer of weights that are gathered together."""

    unused: set[str]  # weights in it that no module has used yet
    numel: int
    is_copied: bool = False  # its weights have been copied out of it
