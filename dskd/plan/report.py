"""A plan as text."""

from dskd.plan import GB
from dskd.plan.changes import Change
from dskd.plan.disk import sample_bytes
from dskd.plan.memory import other_stages
from dskd.plan.plan import Plan
from dskd.text_table import table

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
_ASSUMPTIONS = """\
Memory is counted from the code that trains, on shapes, each part at its own largest moment; "reserved" is assumed.
Speed is an estimate: it stands on --tflops, --bandwidth and --host-bandwidth, which say what a GPU sustains."""


def format_plan(plan: Plan) -> str:
    """The whole plan."""
    return "\n\n".join([_headline(plan), _memory(plan), _speed(plan), _disk(plan), _stages(plan), _ASSUMPTIONS])


def format_offload(plan: Plan, without: Plan | None) -> str:
    """Whether the teacher has to be offloaded; `without` is the plan in which it is not."""
    if without is None:
        return "Offload: none, there is no teacher in training."
    needed = f"a GPU then needs {_gb(without.memory.gpu.peak)} GB of its {_gb(plan.cluster.gpu_memory)}"
    if without.fits:
        return f"Offload: not needed; with teacher.mode=zero3 teacher.offload=none {needed}."
    return f"Offload: needed; with teacher.mode=zero3 teacher.offload=none {needed}."


def format_refusal(plan: Plan, found: tuple[Change, Plan] | None) -> str:
    """What lacks, and what to do."""
    lacks = []
    what = "GPU" if plan.cluster.device == "cuda" else "rank"
    if plan.gpu_excess > 0:
        lacks.append(f"each {what} needs {_gb(plan.memory.gpu.peak)} GB and has {_gb(plan.cluster.gpu_memory)}")
    if plan.host_excess > 0:
        lacks.append(f"each host needs {_gb(plan.memory.host.peak)} GB and has {_gb(plan.cluster.host_memory)}")
    text = f"does not fit: {' and '.join(lacks)}."
    if found is None:
        return f"{text} No setting and no number of such nodes makes it fit: take a smaller student or teacher."
    change, changed = found
    return (
        f"{text}\nThe smallest change that fits: {change.text()}\n"
        f"  then a {what} needs {_gb(changed.memory.gpu.peak)} GB, a host {_gb(changed.memory.host.peak)} GB, and "
        f"{changed.speed.tokens_per_s:,.0f} tokens/s are expected instead of {plan.speed.tokens_per_s:,.0f}"
    )


def _headline(plan: Plan) -> str:
    cluster, student, config = plan.cluster, plan.student, plan.config
    what = "GPU" if cluster.device == "cuda" else "rank without a GPU"
    values = plan.architecture.values()
    trunk = (
        f"the lowest {student.trunk} are computed once, in the teacher"
        if student.trunk
        else f"the student computes all of them ({student.why_no_trunk or 'student.shared_trunk is off'})"
    )
    loaded = "no teacher in training" if not config.needs_teacher else _teacher_place(plan)
    accumulated = plan.accumulation_steps
    return "\n".join(
        [
            f"Teacher: {plan.architecture.named_by.rpartition(': ')[2]}, {values['num_hidden_layers']} layers, "
            f"{(plan.teacher.numel + values['vocab_size'] * values['hidden_size']) / 1e9:.2f} billion parameters; "
            f"{loaded}",
            f"Student: {len(student.layers)} layers, {student.whole_numel / 1e9:.2f} billion parameters, "
            f"{student.shapes.trained_numel / 1e9:.3f} of them trained; {trunk}",
            f"Machines: {_count(cluster.nodes, 'node')} of {_count(cluster.gpus_per_node, what)} with "
            f"{_gb(cluster.gpu_memory)} GB each and {_gb(cluster.host_memory)} GB of host memory (GB are 2^30 bytes)",
            f"A step: {config.train.global_batch_size} sequences of {config.corpus.sequence_length:,} tokens, "
            f"{accumulated} × {plan.micro_batch_size} a rank, "
            f"{str(cluster.dtype(config.precision)).removeprefix('torch.')}",
        ]
    )


def _teacher_place(plan: Plan) -> str:
    teacher = plan.config.teacher
    if teacher.mode == "resident":
        return "resident, all of it on every rank"
    where = {"none": "on its GPU", "cpu": "in the host's memory", "nvme": "on a local disk"}[teacher.offload]
    return f"zero3, each rank's share {where}"


def _memory(plan: Plan) -> str:
    gpu, host = plan.memory.gpu, plan.memory.host
    rows = [[text, _gb(getattr(gpu, name)), _gb(getattr(host, name))] for name, text in _PARTS.items()]
    rows.append([f"at one time, most in {gpu.peak_moment}", _gb(gpu.peak), _gb(host.peak)])
    rows.append(["there is", _gb(plan.cluster.gpu_memory), _gb(plan.cluster.host_memory)])
    what = "a GPU" if plan.cluster.device == "cuda" else "a rank"
    return table(("memory, GB", what, "a host"), rows)


def _speed(plan: Plan) -> str:
    speed = plan.speed
    rows = [
        ["tokens/s of all ranks", f"{speed.tokens_per_s:,.0f}"],
        ["seconds a step", f"{speed.step_s:.2f}"],
        ["hours", "unknown: give --samples" if plan.hours is None else _hours(plan.hours)],
        ["steps", "unknown: give --samples" if plan.steps is None else f"{plan.steps:,}"],
        ["GFLOPs a token", f"{sum(speed.flops_per_token.values()) / 1e9:.2f}"],
        ["share of a step with communication", f"{speed.network_share:.0%}"],
        ["share of a step waiting for it", f"{speed.waiting_share:.0%}"],
    ]
    return table(("expected speed", "figure"), rows)


def _disk(plan: Plan) -> str:
    disk = plan.disk
    shards = f"{sample_bytes(plan.config) / 2**10:.1f} KB a sample" if disk.shards is None else _gb(disk.shards)
    rows = [
        ["senses, at most, without spans", _gb(disk.senses)],
        ["states while senses are built, at most", _gb(disk.states)],
        ["shards before compression", shards],
        ["student", _gb(disk.student)],
        ["checkpoints of a run", _gb(disk.checkpoints)],
    ]
    if disk.nvme:
        rows.append(["teacher on each node's local disk", _gb(disk.nvme)])
    return table(("disk, GB", "size"), rows)


def _stages(plan: Plan) -> str:
    gather, annotate, host = other_stages(plan.config, plan.cluster, plan.architecture, plan.teacher)
    return (
        f"The stages before: gathering states takes {_gb(gather)} GB of a GPU, annotation at most {_gb(annotate)} GB, "
        f"and a host {_gb(host)} GB in either."
    )


def _gb(size: int) -> str:
    value = size / GB
    return f"{value:,.0f}" if value >= 1000 or value == round(value) else f"{value:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}"


def _count(number: int, what: str) -> str:
    head, _, rest = what.partition(" ")
    return f"{number} {head}{'s' * (number != 1)}{f' {rest}' if rest else ''}"
