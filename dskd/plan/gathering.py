"""What ZeRO-3 gathers while a model runs: how many weights are whole at one time, and how many travel.

A model of DeepSpeed's coordinator in numbers. Before a module runs, its weights are gathered; then weights of modules
to come are, about `PREFETCH` elements ahead each time, as long as no more than `MAX_LIVE` are whole. Afterwards those
are let go that are not needed again within the next `MAX_REUSE` elements. Weights that are gathered together come in
one buffer, out of which each is copied: until the last of them is used they are there twice.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dskd.plan.shapes import Shapes, Weight

# DeepSpeed's defaults, in elements: stage3_prefetch_bucket_size, stage3_max_live_parameters, stage3_max_reuse_distance.
PREFETCH, MAX_LIVE, MAX_REUSE = 50_000_000, 1_000_000_000, 1_000_000_000
# What training sets: stage3_param_persistence_threshold is so many times the width, and smaller weights stay gathered.
PERSISTENT_WIDTHS = 10


@dataclass(frozen=True)
class Gathered:
    """Elements, of one pass over a micro-batch."""

    along: tuple[int, ...]  # held while each module runs forward
    at_turn: int  # held when the last module has run forward, and the loss is computed
    backward: int  # the most that is held in the backward pass
    travelled: int  # gathered, each time counted

    @property
    def forward(self) -> int:
        """The most that is held in the forward pass."""
        return max(self.along, default=0)


def gather(shapes: Shapes, *, persistent: int, backward: bool, is_gloo: bool = False) -> Gathered:
    """What is gathered in a forward pass, or in one with its backward pass.

    Args:
        shapes: the model.
        persistent: weights of so many elements or fewer stay gathered and do not count here.
        backward: whether there is a backward pass, over the same modules in reverse.
        is_gloo: ranks without GPUs talk over gloo, which has a buffer of its own for all that is under way.
    """
    # Modules around others have no weights, but gather ahead; training puts one more around the model.
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
        self._fetched_for: dict[str, int] = {}  # the last use that a weight was gathered, or kept, for
        self._available: dict[str, int] = {}  # asked for, if not whole yet
        self._buffers: list[_Buffer] = []
        self.travelled = 0

    def run(self, number: int) -> int:
        """Runs one module; the most elements that were held, buffers included."""
        use = self._uses[number]
        names = {weight.name for weight in use}
        self._gather([weight for weight in use if weight.name not in self._available])
        for buffer in self._buffers:
            if buffer.unused & names:  # now it has to be there, and all of it is copied
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
        room = min(MAX_LIVE - sum(self._available.values()), PREFETCH)
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
        if len(weights) > 1:  # a single one comes into its place
            self._buffers.append(_Buffer({weight.name for weight in weights}, numel))

    def _is_needed_soon(self, weight: Weight, number: int) -> bool:
        passed = 0
        for use in self._uses[number + 1 :]:
            if passed >= MAX_REUSE:
                return False
            if weight in use:
                return True
            passed += sum(other.numel for other in use)
        return False

    def held(self) -> int:
        """Elements that are held now, buffers included."""
        waiting = {name for buffer in self._buffers if not buffer.is_copied for name in buffer.unused}
        whole = sum(numel for name, numel in self._available.items() if name not in waiting)
        under_way = sum(buffer.numel for buffer in self._buffers if not buffer.is_copied) * self._is_gloo
        return whole + sum(buffer.numel for buffer in self._buffers) + under_way


@dataclass
class _Buffer:
    """Weights that are gathered together."""

    unused: set[str]
    numel: int
    is_copied: bool = False
