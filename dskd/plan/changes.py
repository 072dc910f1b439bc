"""The smallest change that makes a job fit, by trying: each change by itself, then two together, then more machines."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dskd.errors import UserError
from dskd.plan.plan import Plan

_MOST_NODES = 1024


@dataclass(frozen=True)
class Change:
    """Something that would be set differently."""

    overrides: tuple[str, ...] = ()
    nodes: int | None = None

    def text(self) -> str:
        """As the command line has it."""
        return " ".join([*self.overrides, *([] if self.nodes is None else [f"--nodes {self.nodes}"])])


def candidates(plan: Plan) -> list[Change]:
    """Changes that take less memory, in the order of what they cost: first those that change neither what is minimised
    nor much of the speed, then those that take time, then those that need preparations. None changes the loss.
    """
    train, teacher = plan.config.train, plan.config.teacher
    found = []
    if train.sense_bank == "device":
        found.append(Change(("train.sense_bank=host",)))
    size = plan.micro_batch_size
    while size > 1:
        size = max(divisor for divisor in range(1, size) if plan.micro_batch_size % divisor == 0)
        found.append(Change((f"train.micro_batch_size={size}",)))
    if train.loss_chunk_size is not None or plan.cluster.device == "cuda":
        found.append(Change(("train.loss_chunk_size=64",)))
    if not train.activation_checkpointing:
        found.append(Change(("train.activation_checkpointing=true",)))
    if plan.config.needs_teacher:
        places = []
        if teacher.mode == "resident":
            places = [("none", "teacher.mode=zero3"), ("cpu", "teacher.mode=zero3"), ("nvme", "teacher.mode=zero3")]
        elif plan.cluster.device == "cuda":
            order = ["none", "cpu", "nvme"]
            # The other way round where the host's memory is what lacks.
            others = order[order.index(teacher.offload) + 1 :] if plan.gpu_excess > 0 else ["none", "nvme"]
            places = [(place, "") for place in others if place != teacher.offload]
        for place, mode in places:
            where = ("teacher.nvme_path=/local/dskd",) if place == "nvme" and teacher.nvme_path is None else ()
            away = ("teacher.nvme_path=null",) if place != "nvme" and teacher.nvme_path is not None else ()
            found.append(Change((*([mode] if mode else []), f"teacher.offload={place}", *where, *away)))
        if not plan.config.loss.hidden_weight and plan.config.student.shared_trunk != "on":
            top_n = () if plan.config.annotation.teacher_top_n else ("annotation.teacher_top_n=64",)
            found.append(Change(("teacher.mode=cached", *top_n)))
    return found


def smallest_change(plan: Plan, replan: Callable[[Change], Plan]) -> tuple[Change, Plan] | None:
    """The first change that makes the job fit, with its plan, or None.

    Args:
        plan: of the job that does not fit.
        replan: the plan with a change.
    """
    for change in _in_order(plan):
        try:
            changed = replan(change)
        except UserError:  # a batch that cannot be shared out over so many ranks, keys that exclude each other
            continue
        if changed.fits:
            return change, changed
    return None


def _in_order(plan: Plan) -> Iterator[Change]:
    single = candidates(plan)
    yield from single
    pairs = list(itertools.combinations(single, 2))
    yield from (_both(one, other) for one, other in pairs if not _keys(one) & _keys(other))
    # Everything that takes no preparation together, then more and more nodes, alone and with it.
    most = _strongest(single)
    if most.overrides:
        yield most
    nodes = plan.cluster.nodes * 2
    while nodes <= _MOST_NODES:
        yield Change(nodes=nodes)
        yield Change(most.overrides, nodes)
        nodes *= 2


def _both(one: Change, other: Change) -> Change:
    return Change(one.overrides + other.overrides)


def _keys(change: Change) -> set[str]:
    keys = {override.partition("=")[0] for override in change.overrides}
    return keys | ({"teacher"} if any(key.startswith("teacher.") for key in keys) else set())


def _strongest(single: list[Change]) -> Change:
    """The last value of every key that needs no preparation."""
    chosen: dict[str, Change] = {}
    for change in single:
        key = change.overrides[0].partition("=")[0].split(".")[0 if change.overrides[0].startswith("teacher") else -1]
        if not any("cached" in part or "nvme_path=/" in part for part in change.overrides):
            chosen[key] = change
    return Change(tuple(override for change in chosen.values() for override in change.overrides))
