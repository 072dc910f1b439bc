"""The plan of a job: its memory, time and disk space, and whether it fits on the machines."""

from dataclasses import dataclass
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.hashing import MANIFEST_NAME
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config
from dskd.errors import UserError
from dskd.plan.architecture import Architecture
from dskd.plan.cluster import Cluster
from dskd.plan.disk import Disk, compute_disk, dictionary_rows
from dskd.plan.memory import RESERVED_ON_HOST, Memory, StageMemory, compute_memory, gather_models, stages_before
from dskd.plan.shapes import Shapes, StudentShapes, plan_student, teacher_shapes, trunk_to_store
from dskd.plan.speed import Speed, compute_speed
from dskd.plan.stored import stored_in_shards
from dskd.plan.stored_speed import StatesComparison, compare_with_stored_states
from dskd.plan.writing import Writing, plan_writing
from dskd.shards import StoredStates
from dskd.training.models.teacher_source import as_annotated
from dskd.training.schedule import count_steps, divide_batch

RELATIONS = 0.2  # assumed share of targets with a synonym or antonym, if it is not known: more than WordNet gives


@dataclass(frozen=True)
class Plan:
    """The needs of a job, together with what they were computed from."""

    config: Config
    cluster: Cluster
    architecture: Architecture
    teacher: Shapes
    student: StudentShapes
    micro_batch_size: int
    accumulation_steps: int
    samples: int | None
    steps: int | None
    memory: Memory
    before: tuple[StageMemory, ...]
    is_annotated: bool  # the shards exist, so the stages before training are done
    is_outdated: bool  # the shards exist, and hold other data of the teacher than the plan counts with
    speed: Speed
    comparison: (
        StatesComparison | None
    )  # with and without stored states; None if training reads no states of the teacher
    disk: Disk
    writing: Writing | None  # None if the teacher does not write the text

    @property
    def stages(self) -> tuple[StageMemory, ...]:
        """Returns the needs of the stages that have not run yet, training last."""
        training = StageMemory("training", self.memory.gpu.peak, self.memory.host.peak)
        return (training,) if self.is_annotated else (*self.before, training)

    @property
    def too_large_for_gpus(self) -> list[StageMemory]:
        """Returns the stages for which a GPU's memory is too small, or without GPUs, a rank's share of memory."""
        return [stage for stage in self.stages if stage.gpu > self.cluster.gpu_memory]

    @property
    def too_large_for_hosts(self) -> list[StageMemory]:
        """Returns the stages for which a host's memory is too small."""
        return [stage for stage in self.stages if stage.host > self.cluster.host_memory]

    @property
    def processes(self) -> int:
        """Returns the bytes that the processes of a host's ranks are assumed to need, which no setting changes."""
        return RESERVED_ON_HOST * self.cluster.gpus_per_node

    @property
    def fits(self) -> bool:
        """Returns True if every stage has enough memory."""
        return not self.too_large_for_gpus and not self.too_large_for_hosts

    @property
    def hours(self) -> float | None:
        """Returns the hours that training takes, or None if the number of steps is unknown."""
        return None if self.steps is None else self.steps * self.speed.step_s / 3600


def make_plan(
    config: Config,
    cluster: Cluster,
    architecture: Architecture,
    *,
    samples: int | None = None,
    relations: float = RELATIONS,
) -> Plan:
    """Plans a job.

    If `samples`, the number of training sequences, is None, it is that in the work directory's shards if they exist,
    and otherwise corpus.max_sequences. `relations` is the share of targets that have a synonym or an antonym.

    Raises:
        UserError: when training with this config is impossible on these machines: the batch cannot be divided among the
            ranks, the teacher is not supported or lacks the student's layers, there are too few samples, or training
            with teacher.mode: cached would find nothing in the shards.
    """
    shards = _shards(config)
    config = as_annotated(config, shards)
    config.require_stored()
    micro_batch_size, accumulation_steps = divide_batch(config.train, cluster.world_size)
    architecture.check(config)
    student = plan_student(config, architecture)
    hidden_size = architecture.values()["hidden_size"]
    trunk = trunk_to_store(config, architecture)
    to_store = stored_in_shards(config, cluster.dtype(config.precision), hidden_size, trunk)
    teacher = teacher_shapes(architecture)
    if samples is None:
        samples = config.corpus.max_sequences if shards is None else int(shards.facts["samples"])
    if samples is not None and samples < config.train.global_batch_size:
        raise UserError(
            f"train.global_batch_size: {config.train.global_batch_size} sequences a step, but there are {samples}; "
            "lower it, or add text"
        )
    steps = config.train.steps if samples is None else count_steps(config.train, samples)
    batches = {"micro_batch_size": micro_batch_size, "accumulation_steps": accumulation_steps}
    memory = compute_memory(
        config,
        cluster,
        architecture,
        teacher,
        student,
        **batches,
        relations=relations,
        bank_rows=dictionary_rows(config, architecture),
    )
    teacher_gathered, student_gathered = gather_models(config, cluster, architecture, teacher, student)
    speed = compute_speed(
        config, cluster, architecture, teacher, student, teacher_gathered, student_gathered, **batches
    )
    comparison = compare_with_stored_states(
        config, cluster, architecture, teacher, student.trunk, **batches, samples=samples
    )
    disk = compute_disk(config, cluster, architecture, teacher, student, samples=samples, steps=steps)
    before = stages_before(config, cluster, architecture, teacher, states=disk.states, rows=disk.senses)
    is_annotated = shards is not None and _are_current(shards, config, to_store)
    return Plan(
        config, cluster, architecture, teacher, student, **batches, samples=samples, steps=steps, memory=memory,
        before=before, is_annotated=is_annotated, is_outdated=shards is not None and not is_annotated, speed=speed,
        comparison=comparison, disk=disk, writing=plan_writing(config, cluster, architecture, teacher),
    )  # fmt: skip


def _shards(config: Config) -> Manifest | None:
    folder = config.path(kinds.SHARDS.folder, "train")
    if not Path(folder, MANIFEST_NAME).is_file():
        return None
    return read_manifest(folder, kinds.SHARDS.name, files_are_here=False)


def _are_current(shards: Manifest, config: Config, to_store: StoredStates | None) -> bool:
    """Returns True if the shards hold what the config stores of the teacher; otherwise they have to be annotated again.

    Compares states by their columns, type, width and depth, as annotation's recipe does, and the number of tokens.
    """
    top_n = shards.config.get("teacher_top_n", 0)
    return StoredStates.of(shards) == to_store and top_n == config.annotation.teacher_top_n
