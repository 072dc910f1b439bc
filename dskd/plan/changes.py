"""A search for the smallest change that makes a job fit: one setting, two settings, as many as it takes, more nodes."""

import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dskd.console import gigabytes
from dskd.errors import UserError
from dskd.plan.plan import Plan
from dskd.plan.stored import loads_teacher

_MOST_NODES = 1024
# Settings for which the user must prepare something.
_PREPARED = ("teacher.mode=cached", "teacher.nvme_path=/", "annotation.store=")


@dataclass(frozen=True)
class Change:
    """A change of a job: other settings, another number of nodes, or both."""

    overrides: tuple[str, ...] = ()
    nodes: int | None = None

    def text(self) -> str:
        """Returns the change as arguments of the command line."""
        return " ".join([*map(shlex.quote, self.overrides), *([] if self.nodes is None else [f"--nodes {self.nodes}"])])

    def preparations(self, plan: Plan) -> list[str]:
        """Returns sentences on what the user must do before training with this change, and what it costs."""
        needed = []
        if any(override.startswith("teacher.nvme_path=/") for override in self.overrides):
            needed.append("teacher.nvme_path names a folder on a fast local disk of every node: replace it with yours")
        if any(override.startswith("annotation.teacher_top_n=") for override in self.overrides):
            needed.append("with annotation.teacher_top_n the shards are annotated again, and are larger")
        if any(override.startswith("annotation.store=") for override in self.overrides):
            samples, each = plan.disk.samples, plan.disk.sample_states
            size = "" if samples is None else f"; the states take {gigabytes(samples * each)} of disk"
            needed.append(f"with annotation.store the shards are annotated again{size}")
        return needed


def stored_states(columns: Sequence[str], mode: str) -> Change:
    """Returns the change with which training reads these columns of stored states, if `teacher.mode` is `mode` now."""
    return Change((*(() if mode == "auto" else ("teacher.mode=auto",)), f"annotation.store=[{','.join(columns)}]"))


def candidates(plan: Plan) -> list[Change]:
    """Returns changes that reduce memory, cheapest first; none of them changes the loss.

    First come changes that cost hardly any speed, then changes that cost time, and then changes that need preparations.
    """
    train, teacher = plan.config.train, plan.config.teacher
    changes = _for_stages_before(plan)
    if train.sense_bank == "device":
        changes.append(Change(("train.sense_bank=host",)))
    size = plan.micro_batch_size
    while size > 1:
        size = max(divisor for divisor in range(1, size) if plan.micro_batch_size % divisor == 0)
        changes.append(Change((f"train.micro_batch_size={size}",)))
    if train.loss_chunk_size is not None or plan.cluster.device == "cuda":
        changes.append(Change(("train.loss_chunk_size=64",)))
    if not train.activation_checkpointing:
        changes.append(Change(("train.activation_checkpointing=true",)))
    if loads_teacher(plan.config):
        offloads = []
        if teacher.mode == "resident":
            offloads = [("none", "teacher.mode=zero3"), ("cpu", "teacher.mode=zero3"), ("nvme", "teacher.mode=zero3")]
        elif plan.cluster.device == "cuda":
            order = ["none", "cpu", "nvme"]
            # If only the host's memory is too small, go the other way: offload less, or to disk.
            others = order[order.index(teacher.offload) + 1 :] if plan.too_large_for_gpus else ["none", "nvme"]
            offloads = [(offload, "") for offload in others if offload != teacher.offload]
        for offload, mode in offloads:
            where = ("teacher.nvme_path=/local/dskd",) if offload == "nvme" and teacher.nvme_path is None else ()
            away = ("teacher.nvme_path=null",) if offload != "nvme" and teacher.nvme_path is not None else ()
            changes.append(Change((*([mode] if mode else []), f"teacher.offload={offload}", *where, *away)))
        if plan.comparison is not None:
            changes.append(stored_states(plan.comparison.columns, teacher.mode))
        sizes = {each.values()["vocab_size"] for each in (plan.architecture, plan.student.architecture)}
        is_readable = len(sizes) == 1 and not plan.config.loss.reads("teacher_states")
        if is_readable and plan.config.student.shared_trunk != "on":
            top_n = () if plan.config.annotation.teacher_top_n else ("annotation.teacher_top_n=64",)
            changes.append(Change(("teacher.mode=cached", *top_n)))
    return changes


def _for_stages_before(plan: Plan) -> list[Change]:
    """Returns smaller batches and budgets for stages before training that do not fit; none changes their results."""
    changes: list[Change] = []
    senses, annotation = plan.config.senses, plan.config.annotation
    sections = {
        "gathering states": ("senses", senses.memory_budget, senses.batch_size),
        "annotation": ("annotation", annotation.memory_budget, annotation.batch_size),
    }
    for stage in plan.stages:
        if stage.name not in sections or stage not in [*plan.too_large_for_gpus, *plan.too_large_for_hosts]:
            continue
        name, budget, size = sections[stage.name]
        # The budget of `senses` is host memory and that of `annotation` GPU memory; without GPUs both are host memory.
        changes += [Change((f"{name}.memory_budget={budget / share:g}",)) for share in (2, 4, 8, 16)]
        while size > 1:
            size //= 2
            changes.append(Change((f"{name}.batch_size={size}",)))
    return changes


def smallest_change(plan: Plan, replan: Callable[[Change], Plan]) -> tuple[Change, Plan] | None:
    """Returns the first change with which the job of `plan` fits, and its plan with it; None if there is none.

    `replan` returns the plan with a change.
    """
    if plan.processes >= plan.cluster.host_memory:  # on each host, however many there are
        return None

    def attempt(change: Change) -> Plan | None:
        try:
            changed = replan(change)
        except UserError:  # the batch cannot be divided among that many ranks, or keys exclude each other
            return None
        return changed if changed.fits else None

    # Try each change alone, then pairs of changes to different keys.
    single = candidates(plan)
    places = itertools.combinations(range(len(single)), 2)
    pairs = [
        Change(single[one].overrides + single[other].overrides)
        for one, other in sorted(places, key=sum)  # the cheapest together first
        if not _keys(single[one]) & _keys(single[other])
    ]
    strongest = _strongest(single)
    for change in itertools.chain(single, pairs):
        changed = attempt(change)
        if changed is not None:
            return change, changed
    # Then everything that needs no preparation together, and then more nodes, without and with all these settings. What
    # fits is reduced to the settings that are needed.
    if (changed := attempt(strongest)) is not None:
        return _trimmed(strongest, changed, attempt)
    for settings in ((), strongest.overrides):
        if (more := _fewest_nodes(plan.cluster.nodes, settings, attempt)) is not None:
            return _trimmed(*more, attempt)
    return None


Attempt = Callable[[Change], Plan | None]


def _fewest_nodes(now: int, settings: tuple[str, ...], attempt: Attempt) -> tuple[Change, Plan] | None:
    """Returns the change to the fewest nodes, above `now`, with which the job fits with these settings, or None.

    Doubles the number until the job fits, and then tries the numbers between the last two.
    """
    few, many = now, now * 2
    while many <= _MOST_NODES and attempt(Change(settings, many)) is None:
        few, many = many, many * 2
    if many > _MOST_NODES:
        return None
    # Not every number between the two can divide the batch evenly, so try each one.
    changes = (Change(settings, number) for number in range(few + 1, many + 1))
    return next((change, changed) for change in changes if (changed := attempt(change)) is not None)


def _trimmed(change: Change, changed: Plan, attempt: Attempt) -> tuple[Change, Plan]:
    """Drops each setting that the change does not need, the costliest (last) first; returns the change and its plan."""
    for override in reversed(change.overrides):
        fewer = Change(tuple(other for other in change.overrides if other != override), change.nodes)
        if (fewer.overrides or fewer.nodes is not None) and (fitting := attempt(fewer)) is not None:
            change, changed = fewer, fitting
    return change, changed


def _keys(change: Change) -> set[str]:
    keys = {override.partition("=")[0] for override in change.overrides}
    return keys | ({"teacher"} if any(key.startswith("teacher.") for key in keys) else set())


def _strongest(single: list[Change]) -> Change:
    """Combines, for every key, its last change that needs no preparation."""
    chosen: dict[str, Change] = {}
    for change in single:
        key = "teacher" if change.overrides[0].startswith("teacher.") else change.overrides[0].partition("=")[0]
        if not any(part.startswith(_PREPARED) for part in change.overrides):
            chosen[key] = change
    return Change(tuple(override for change in chosen.values() for override in change.overrides))
