"""Formatting a plan as text."""

from dskd.artifacts import kinds
from dskd.config import TRUNK_IS_OFF, Config
from dskd.console import table
from dskd.errors import counted
from dskd.plan import GB
from dskd.plan.changes import Change, stored_states
from dskd.plan.plan import Plan
from dskd.plan.stored import columns_read, loads_teacher, reads_states
from dskd.plan.stored_speed import StatesComparison
from dskd.plan.writing import Writing
from dskd.training.models.teacher_source import why_unread
from dskd.training.schedule import describe_learning_rate

_PARTS = {
    "teacher": "teacher",
    "student": "student",
    "optimizer": "optimizer and gradients",
    "activations": "activations",
    "loss": "loss",
    "senses": "sense rows",
    "batches": "other data",
    "reserved": "reserved",
}
_WORTHWHILE = 1.5  # how many times as fast a step must be for the plan to describe stored states that are not used
_ASSUMPTIONS = """\
Memory is counted from the code that trains, on shapes, each part at its own largest moment; "reserved" is assumed.
Speed is an estimate: it depends on --tflops, --bandwidth, --memory-bandwidth, --host-bandwidth and
--disk-bandwidth."""


def format_plan(plan: Plan) -> str:
    """Formats the whole plan."""
    unread = _unread(plan)
    stored = [] if unread is None else [f"Stored states: {unread}."]
    if plan.comparison is not None:
        stored = [_stored(plan, plan.comparison)]
    return "\n\n".join(
        [
            *(_headline(plan), _memory(plan), _speed(plan), _disk(plan), _stages(plan)),
            *([] if plan.writing is None else [_writing(plan, plan.writing)]),
            _ASSUMPTIONS,
            *stored,
        ]
    )


def format_offload(plan: Plan, without: Plan | None) -> str:
    """Formats a line on whether the teacher must be offloaded.

    `without` is the plan in which it is not offloaded, or None if there is no teacher in training.
    """
    if without is None:
        return "Offload: none, there is no teacher in training."
    needed = f"a GPU then needs {_gb(without.memory.gpu.peak)} GB of its {_gb(plan.cluster.gpu_memory)}"
    setting = f"with teacher.mode=zero3 teacher.offload=none {needed}"
    too_large = without.too_large_for_gpus
    if not too_large:
        of_this = "" if plan.fits else " This plan is for the setting of the configuration, which differs."
        teacher = plan.config.teacher
        is_other = teacher.mode == "resident" or teacher.offload != "none"
        return f"Offload: not needed; {setting}.{of_this if is_other else ''}"
    if too_large[-1].name != "training":
        setting += f", and for {too_large[-1].name} {_gb(too_large[-1].gpu)}"
    return f"Offload: needed; {setting}."


def format_refusal(plan: Plan, fitting: tuple[Change, Plan] | None) -> str:
    """Formats which memory is too small, and what to do.

    `fitting` is the smallest change that makes the job fit, with its plan; None if there is none.
    """
    what = "GPU" if plan.cluster.device == "cuda" else "rank"
    gpu, host = _gb(plan.cluster.gpu_memory), _gb(plan.cluster.host_memory)
    lacks = [
        f"for {stage.name} each {what} needs {_gb(stage.gpu)} GB and has {gpu}" for stage in plan.too_large_for_gpus
    ]
    lacks += [
        f"for {stage.name} each node needs {_gb(stage.host)} GB and has {host}" for stage in plan.too_large_for_hosts
    ]
    text = "does not fit:\n" + "\n".join(f"  {lack}" for lack in lacks)
    if fitting is None:
        if plan.processes >= plan.cluster.host_memory:
            return (
                f"{text}\nNo change makes it fit: the processes of {_count(plan.cluster.gpus_per_node, 'rank')} alone "
                f"are assumed to need {_gb(plan.processes)} GB of a node; take nodes with more memory, or fewer ranks "
                "on each."
            )
        return (
            f"{text}\nNo setting that leaves the loss as it is, and no number of such nodes, makes it fit: "
            f"take a smaller student or teacher, or {what}s and nodes with more memory."
        )
    change, changed = fitting
    largest = (max(getattr(stage, name) for stage in changed.stages) for name in ("gpu", "host"))
    needed = " GB, a host ".join(map(_gb, largest))
    lines = [
        f"{text}\nThe smallest change that fits: {change.text()}",
        f"  then a {what} needs {needed} GB at most, and {_speed_of(changed, plan)}",
    ]
    return "\n".join([*lines, *(f"  {preparation}" for preparation in change.preparations(changed))])


def _speed_of(changed: Plan, plan: Plan) -> str:
    now, before = (f"{each.speed.tokens_per_s:,.0f}" for each in (changed, plan))
    return (
        "the same tokens/s are expected: data travels during computation"
        if now == before
        else f"{now} tokens/s are expected instead of {before}"
    )


def _headline(plan: Plan) -> str:
    cluster, student, config = plan.cluster, plan.student, plan.config
    what = "GPU" if cluster.device == "cuda" else "rank without a GPU"
    values = plan.architecture.values()
    trunk = (
        f"the lowest {student.trunk} are computed once, in {_trunk_place(config)}"
        if student.trunk
        else f"the student computes all of them ({student.why_no_trunk or TRUNK_IS_OFF})"
    )
    if student.is_assumed:
        trunk += "; these are the layers of student.spacing: ends, until `dskd student` has measured others"
    loaded = _teacher_place(plan)
    accumulated = plan.accumulation_steps
    return "\n".join(
        [
            f"Teacher: {plan.architecture.named_by.rpartition(': ')[2]}, {values['num_hidden_layers']} layers, "
            f"{plan.architecture.numel() / 1e9:.2f} billion parameters; "
            f"{loaded}",
            f"Student: {len(student.layers)} layers, {student.whole_numel / 1e9:.2f} billion parameters, "
            f"{student.shapes.trained_numel / 1e9:.3f} of them trained; {trunk}",
            f"Machines: {_count(cluster.nodes, 'node')} of {_count(cluster.gpus_per_node, what)} with "
            f"{_gb(cluster.gpu_memory)} GB each and {_gb(cluster.host_memory)} GB of host memory (GB are 2^30 bytes)",
            f"A step: {config.train.global_batch_size} sequences of {config.corpus.sequence_length:,} tokens, "
            f"{accumulated} × {plan.micro_batch_size} a rank, "
            f"{str(cluster.dtype(config.precision)).removeprefix('torch.')}; {describe_learning_rate(config.train)}",
        ]
    )


def _trunk_place(config: Config) -> str:
    return "the teacher" if loads_teacher(config) else "annotation, and their states are read"


def _teacher_place(plan: Plan) -> str:
    teacher = plan.config.teacher
    if not loads_teacher(plan.config):
        return (
            "not loaded in training, which reads its states" if reads_states(plan.config) else "no teacher in training"
        )
    if teacher.mode == "resident":
        return "resident, all of it on every rank"
    where = {"none": "on its GPU", "cpu": "in the host's memory", "nvme": "on a local disk"}[teacher.offload]
    return f"zero3, each rank's share {where}"


def _memory(plan: Plan) -> str:
    gpu, host = plan.memory.gpu, plan.memory.host
    rows = [[text, _gb(getattr(gpu, name)), _gb(getattr(host, name))] for name, text in _PARTS.items()]
    rows.append([f"peak, in {gpu.peak_moment}", _gb(gpu.peak), _gb(host.peak)])
    rows.append(["available", _gb(plan.cluster.gpu_memory), _gb(plan.cluster.host_memory)])
    what = "a GPU" if plan.cluster.device == "cuda" else "a rank"
    return table(("memory, GB", what, "a host"), rows)


def _speed(plan: Plan) -> str:
    speed = plan.speed
    rows = [
        ["tokens/s of all ranks", f"{speed.tokens_per_s:,.0f}"],
        ["seconds a step", f"{speed.step_s:.2f}"],
        ["hours", "unknown: give --samples, or set train.steps" if plan.hours is None else _hours(plan.hours)],
        ["steps", "unknown: give --samples, or set train.steps" if plan.steps is None else f"{plan.steps:,}"],
        ["GFLOPs a token", f"{sum(speed.flops_per_token.values()) / 1e9:.2f}"],
        ["share of a step with communication", f"{speed.network_share:.0%}"],
        ["share of a step waiting for it", f"{speed.waiting_share:.0%}"],
    ]
    return table(("expected speed", "figure"), rows)


def _disk(plan: Plan) -> str:
    disk = plan.disk
    sizes = {
        "shards before compression": disk.sample,
        "stored states, in the shards": disk.sample_states,
        "the same, kept until the shards are complete": disk.sample_kept,
    }
    rows = [
        ["senses, at most, without spans", _gb(disk.senses)],
        ["states while senses are built, at most", _gb(disk.states)],
        *([name, _size_of_samples(size, disk.samples)] for name, size in sizes.items() if size),
        *([["teacher, dequantised", _gb(disk.teacher)]] if disk.teacher else []),
        ["student", _gb(disk.student)],
        ["checkpoints of a run", _gb(disk.checkpoints)],
    ]
    if disk.nvme:
        rows.append(["teacher on each node's local disk", _gb(disk.nvme)])
    return table(("disk, GB", "size"), rows)


def _size_of_samples(size: int, samples: int | None) -> str:
    return f"{size / 2**10:.1f} KB a sample" if samples is None else _gb(size * samples)


def _stored(plan: Plan, stored: StatesComparison) -> str:
    """Formats what reading the teacher's states from the shards takes and saves."""
    change = stored_states(stored.columns, plan.config.teacher.mode).text()
    bandwidth = f"--disk-bandwidth {plan.cluster.disk_bandwidth / GB:g}"
    if not stored.is_planned and stored.gain < _WORTHWHILE:
        now, gain = _unread(plan) or "none", _gain(plan, stored)
        return f"Stored states: {now}. With {change}, at {bandwidth}, a step {gain}."
    faster, of_node = (
        stored.computing.teacher_s / stored.reading.reading_s,
        stored.rate * plan.cluster.gpus_per_node / GB,
    )
    is_limited = stored.reading.step_s > stored.reading.step_without_reading_s
    what = "GPU" if plan.cluster.device == "cuda" else "rank"
    lines = [
        f"Stored states: {' and '.join(stored.columns)}"
        if stored.is_planned
        else f"Stored states: {_unread(plan) or 'none'}. With {change}:",
        f"  a step {_gain(plan, stored)}",
        f"  reading the states is {_compared(faster)} computing them, at {bandwidth}",
        f"  each {what} reads {stored.rate / GB:.2f} GB/s if the disks keep up, a node {of_node:,.1f} GB/s"
        + (f": more than {bandwidth}, which limits the step" if is_limited else ""),
    ]
    if stored.disk is not None and stored.storing_s is not None and plan.steps is not None:
        seconds = stored.storing_s, *(plan.steps * speed.step_s for speed in (stored.reading, stored.computing))
        once, one, other = (f"{_hours(each / 3600)} hours" for each in seconds)
        copies = ", and as much on each node" if _is_copied(plan) else ""
        lines += [
            f"  the states take {_gb(stored.disk)} GB of disk{copies}"
            + (", and twice that until the shards are complete" if stored.reads_once else ""),
            f"  {'the dictionary' if stored.reads_once else 'annotation'} runs the teacher once, for about {once}"
            + (", and annotation does not" if stored.reads_once else "")
            + f"; each run then takes {one} instead of {other}",
        ]
    return "\n".join(lines)


def _gain(plan: Plan, stored: StatesComparison) -> str:
    """Returns how long a step takes that reads the states, and if it takes longer, at which bandwidth it would not."""
    if stored.gain >= 1:
        return f"is {stored.gain:.1f} times as fast as with the teacher in it"
    least = stored.break_even * plan.cluster.disk_bandwidth / GB
    return (
        f"takes {1 / stored.gain:,.1f} times as long as with the teacher in it; reading is faster above "
        f"--disk-bandwidth {least:.2g}"
    )


def _unread(plan: Plan) -> str | None:
    """Returns which states are stored, but not read, why, and what to set; None if there are none."""
    return why_unread(plan.config, plan.config.annotation.store, columns_read(plan.config, plan.student.trunk))


def _is_copied(plan: Plan) -> bool:
    """Returns True if each node has its own copy of shards with states, instead of reading them where they are."""
    return plan.config.train.shard_cache is not None or plan.config.train.shard_remote is not None


def _compared(times: float) -> str:
    return f"{times:.1f} times as fast as" if times > 1 else "slower than"


def _stages(plan: Plan) -> str:
    what = "a GPU" if plan.cluster.device == "cuda" else "a rank"
    rows = [[stage.name, _gb(stage.gpu), _gb(stage.host)] for stage in plan.before]
    text = table(("the stages before, at most, GB", what, "a host"), rows)
    if plan.is_outdated:
        return (
            f"{text}\nThe shards in the work directory hold other data of the teacher than this plan counts with, so "
            f"make them again\nwith `{kinds.SHARDS.made_by}`."
        )
    return f"{text}\nThey are done: the shards exist." if plan.is_annotated else text


def _writing(plan: Plan, writing: Writing) -> str:
    """Formats what it takes to let the teacher write the text."""
    if writing.is_done:
        return f"The teacher's texts are written: {writing.texts:,}."
    unknown = f"unknown: {writing.missing}"
    rows = [
        ["texts", unknown if writing.texts is None else f"{writing.texts:,}"],
        ["tokens to write, at most", "unknown" if writing.tokens is None else f"{writing.tokens:,}"],
        ["GFLOPs a written token, with its prompt", f"{writing.flops_per_token / 1e9:.2f}"],
    ]
    if plan.config.corpus.server is not None:
        rows.append(["tokens/s and hours", "unknown: those of corpus.server"])
        return table(("the teacher writes the text", "figure"), rows)
    what = "GPU" if plan.cluster.device == "cuda" else "rank"
    rows += [
        ["tokens/s of all ranks, if each text has all its tokens", f"{writing.tokens_per_s:,.0f}"],
        ["hours", "unknown" if writing.hours is None else _hours(writing.hours)],
        [f"memory of a {what}, GB", _gb(writing.memory)],
    ]
    lines = [table(("the teacher writes the text", "figure"), rows), f"Its speed is limited by {writing.limit}."]
    if writing.memory > plan.cluster.gpu_memory:
        lines.append(f"A {what} has {_gb(plan.cluster.gpu_memory)} GB: lower corpus.batch_size, or use corpus.server.")
    return "\n".join(lines)


def _gb(size: int) -> str:
    value = size / GB
    return f"{value:,.0f}" if value >= 1000 or value == round(value) else f"{value:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}"


def _count(number: int, what: str) -> str:
    head, _, rest = what.partition(" ")
    return f"{counted(number, head)}{f' {rest}' if rest else ''}"
