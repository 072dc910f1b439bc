"""The bytes that training holds on each GPU and in each host's memory, by what they are used for.

Weights, optimizer, buffers and batches are held all the time. The phases of a step hold more in addition, one after the
other: the teacher's forward, the student's forward, the loss, the backward pass and the optimizer's step. The peak is
that of the largest phase.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_leaves

from dskd.config import Config
from dskd.losses.head import HeadSizes
from dskd.models.checks.head_probe import declared_transform
from dskd.models.running.nvme import BUFFERS, buffer_numel
from dskd.models.structure.causal_lm import PERSISTENT_WIDTHS
from dskd.plan import GB
from dskd.plan.activations import Activations, Batch, loaded_tensors, student_activations, teacher_activations
from dskd.plan.architecture import Architecture
from dskd.plan.cluster import Cluster
from dskd.plan.gathering import Gathered, gather
from dskd.plan.shapes import Shapes, StudentShapes
from dskd.plan.stored import columns_read, loads_teacher, reads_states
from dskd.plan.student_memory import student_bytes
from dskd.senses.dictionary import VALUE_BYTES
from dskd.shards import TRUNK_STATES
from dskd.shards.blocks import SAMPLES_PER_SHARD
from dskd.training.checkpoints.writing import EXPORTED_BYTES
from dskd.training.data.distribution_candidates import most_candidates
from dskd.training.data.loader import COMPLETED_STEPS, PREFETCHED_STEPS
from dskd.training.data.positions import SensePositions
from dskd.training.data.sense_bank import bank_is_on_device
from dskd.training.models.teacher_source import TeacherSource

# Memory of a process in addition to tensors, which is assumed, not counted: on a GPU the contexts of CUDA and NCCL, and
# fragmented memory that the allocator cannot use; in the host's memory Python, torch and DeepSpeed.
RESERVED_ON_GPU = 2 * GB
RESERVED_ON_HOST = 2 * GB


@dataclass(frozen=True)
class Parts:
    """The bytes of memory by use, each at its own peak, and the peak of all together."""

    teacher: int
    student: int
    optimizer: int
    activations: int
    loss: int
    senses: int
    batches: int
    reserved: int
    peak: int
    peak_moment: str

    @property
    def tensors(self) -> int:
        """Returns the peak without the reserved memory, which is the peak that an allocator of tensors would report."""
        return self.peak - self.reserved


@dataclass(frozen=True)
class Memory:
    """The memory that training needs."""

    gpu: Parts  # of each GPU, or of each rank without one
    host: Parts  # of each host


def batch_of(config: Config, micro_batch_size: int, *, relations: float, trunk: int = 0) -> Batch:
    """Returns the largest micro-batch that can occur if `relations` is the share of targets that have a synonym or an
    antonym, and the student need not compute its `trunk` lowest layers.
    """
    loss, kappa, length = config.loss, config.annotation.kappa, config.corpus.sequence_length
    lexical = min(length, round(relations * length))
    positions = SensePositions.of(loss, seed=0).number(lexical) * micro_batch_size if loss.reads("sense_rows") else 0
    rows, candidates = 3 * positions * kappa, None  # synonyms, antonyms and own rows, if all are distinct
    if loss.reads("candidate_rows"):
        candidates = most_candidates(loss, kappa)
        positions *= 2  # a term at each position that is drawn for its relations or for its own rows
        rows = positions * candidates[0] + candidates[1]
    return Batch(
        micro_batch_size,
        length,
        config.corpus.packing == "documents",
        positions,
        0 if bank_is_on_device(config) else rows,
        kappa,
        config.annotation.teacher_top_n if TeacherSource.planned(config).kind == "top_n" else 0,
        columns_read(config, trunk),
        loss.position_share < 1,
        candidates,
    )


def batch_bytes(batch: Batch, hidden_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the bytes that the loader brings for a micro-batch: those of sense rows, of stored states, and of all the
    rest.
    """
    with torch.device("meta"):
        tensors = loaded_tensors(batch, hidden_size, dtype)
    rows = tensors["senses"].pop("sense_rows").nbytes if batch.sense_rows else 0
    states = sum(tensors.pop(column).nbytes for column in batch.state_columns)
    return rows, states, sum(leaf.nbytes for leaf in tree_leaves(tensors))


def compute_memory(
    config: Config,
    cluster: Cluster,
    architecture: Architecture,
    teacher: Shapes,
    student: StudentShapes,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    relations: float,
    bank_rows: int,
) -> Memory:
    """Computes the bytes that a rank of training and its host hold.

    `architecture` is the teacher's, and `teacher` are its weights, without the output matrix unless that is tied to the
    embeddings. `relations` is the share of targets that have a synonym or an antonym, and `bank_rows` the number of
    rows in the sense dictionary.
    """
    dtype = cluster.dtype(config.precision)
    size, hidden_size, with_teacher = dtype.itemsize, architecture.values()["hidden_size"], loads_teacher(config)
    batch = batch_of(config, micro_batch_size, relations=relations, trunk=student.trunk)
    activations = _activations(config, cluster, architecture, student, batch)
    teacher_activation_bytes = teacher_activations(architecture, _only_text(batch), dtype) if with_teacher else 0
    # The teacher: what a rank holds all the time, and what is gathered while it runs.
    held, host_teacher, gathered = 0, 0, None
    if with_teacher:
        held, host_teacher, gathered = _teacher(config, cluster, teacher, size, PERSISTENT_WIDTHS * hidden_size)
    teacher_live = _live(gathered.forward if gathered else 0, size, config, cluster)
    held_by_student = student_bytes(cluster, student, size)
    of_batches, prefetched = _batches(config, cluster, batch, hidden_size, accumulation_steps, bank_rows)

    static = held + held_by_student.held + held_by_student.optimizer + sum(of_batches.values())
    # What each phase holds in addition to all that is always there; the largest decides the peak. Activations grow from
    # module to module while prefetched weights are released, so the peak of a forward pass can be at any module.
    along = held_by_student.along
    phase_bytes = {
        "the teacher's forward pass": teacher_live + teacher_activation_bytes,
        "the student's forward pass": max(
            elements + activations.forward * (number + 1) // len(along) for number, elements in enumerate(along)
        ),
        "the loss": held_by_student.at_turn + activations.kept + activations.loss,
        "the backward pass": held_by_student.during_backward + activations.backward,
        "the sum over ranks": held_by_student.during_sum,
        "the optimizer's step": held_by_student.update,
    }
    moment = max(phase_bytes, key=phase_bytes.__getitem__)
    reserved = RESERVED_ON_GPU if cluster.device == "cuda" else RESERVED_ON_HOST
    gpu = Parts(
        teacher=held + teacher_live,
        student=held_by_student.most_weights,
        optimizer=held_by_student.most_of_optimizer,
        activations=max(teacher_activation_bytes, activations.forward, activations.backward),
        loss=activations.loss,
        **of_batches,
        reserved=reserved,
        peak=static + phase_bytes[moment] + reserved,
        peak_moment=moment,
    )
    return Memory(gpu, _host(cluster, gpu, host_teacher, prefetched, student.shapes.trained_numel))


def _activations(
    config: Config, cluster: Cluster, architecture: Architecture, student: StudentShapes, batch: Batch
) -> Activations:
    """Measures the student's activations; `architecture` is the teacher's."""
    teacher_values, student_values = architecture.values(), student.architecture.values()
    return student_activations(
        student.architecture,
        tuple(student.layers),
        student.trunk,
        config.student,
        config.loss,
        batch,
        cluster.dtype(config.precision),
        sizes=HeadSizes.of(config.train.loss_chunk_size, student_values["vocab_size"], torch.device(cluster.device)),
        checkpointing=config.train.activation_checkpointing,
        with_teacher=loads_teacher(config) or reads_states(config),
        teacher_matrix=(teacher_values["vocab_size"], teacher_values["hidden_size"]),
        has_copy=student.teacher_matrix > 0,
        teacher_transform=declared_transform(architecture.load_config()),
    )


def _batches(
    config: Config, cluster: Cluster, batch: Batch, hidden_size: int, accumulation_steps: int, bank_rows: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the bytes of batches and sense rows on a GPU, and those that a rank's loader holds in the host's memory.

    A GPU holds two copies of the loader's data for a step, and the whole bank of sense rows if it is there. The host
    holds steps that workers have prepared, without states and sense rows, and whole steps, from which a GPU's are
    copied.
    """
    sizes = batch_bytes(batch, hidden_size, cluster.dtype(config.precision))
    senses, states, rest = (part * accumulation_steps for part in sizes)
    on_gpu = cluster.device == "cuda"
    bank = bank_rows * hidden_size * VALUE_BYTES if on_gpu and bank_is_on_device(config) else 0
    copies = 2 if on_gpu else 0  # of this step and the next; without a GPU they stay in the host's memory
    prepared = PREFETCHED_STEPS * max(1, config.train.num_workers)
    completed = COMPLETED_STEPS if on_gpu or states or senses else 0
    return (
        {"senses": senses * copies + bank, "batches": (states + rest) * copies},
        {"senses": senses * completed, "batches": rest * prepared + (states + rest) * completed},
    )


def gather_models(
    config: Config, cluster: Cluster, architecture: Architecture, teacher: Shapes, student: StudentShapes
) -> tuple[Gathered | None, Gathered]:
    """Simulates what ZeRO-3 gathers of teacher and student for a micro-batch; None if no teacher is sharded."""
    small, small_of_student = (
        PERSISTENT_WIDTHS * each.values()["hidden_size"] for each in (architecture, student.architecture)
    )
    is_gloo, teacher_gathered = cluster.device == "cpu", None
    if loads_teacher(config) and config.teacher.mode != "resident":
        teacher_gathered = gather(teacher, persistent=small, backward=False, is_gloo=is_gloo)
    return teacher_gathered, gather(student.shapes, persistent=small_of_student, backward=True, is_gloo=is_gloo)


def _only_text(batch: Batch) -> Batch:
    """Returns a batch of the same texts with nothing else, which is all that the teacher reads."""
    return replace(batch, sense_positions=0, sense_rows=0, teacher_top_n=0, state_columns=())


def _teacher(
    config: Config, cluster: Cluster, teacher: Shapes, size: int, persistent: int
) -> tuple[int, int, Gathered | None]:
    """Returns the teacher's bytes on a GPU, its bytes in the host's memory per rank, and what ZeRO-3 gathers of it."""
    if config.teacher.mode == "resident":
        return teacher.numel * size, 0, None
    ranks, offload = cluster.world_size, config.teacher.offload
    gathered = gather(teacher, persistent=persistent, backward=False, is_gloo=cluster.device == "cpu")
    kept = teacher.persistent(persistent) * size if ranks > 1 else 0
    if offload == "none" or cluster.device == "cpu":
        return teacher.share(ranks) * size + kept, 0, gathered
    if offload == "cpu":
        return kept, sum(_pinned(weight.share(ranks) * size) for weight in teacher.weights), gathered
    largest = max(weight.numel for weight in teacher.weights)
    return kept, _pinned(BUFFERS * buffer_numel(largest, ranks) * size), gathered


def _pinned(size: int) -> int:
    """Returns the bytes that torch allocates for `size` bytes of page-locked memory: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _live(elements: int, size: int, config: Config, cluster: Cluster) -> int:
    """Returns the bytes of the teacher's gathered weights, if `elements` are whole at once."""
    if cluster.world_size > 1:
        return elements * size
    # A single rank gathers nothing, but copies weights from the host's memory to the GPU.
    return elements * size if cluster.device == "cuda" and config.teacher.offload != "none" else 0


def _host(cluster: Cluster, gpu: Parts, teacher: int, prefetched: Mapping[str, int], trained: int) -> Parts:
    """Returns what all ranks of a node together hold in its memory; each has `prefetched` bytes of batches."""
    ranks = cluster.gpus_per_node
    is_cpu = cluster.device == "cpu"
    saved = EXPORTED_BYTES * trained  # which rank 0 writes with each checkpoint
    of = {
        "teacher": (teacher + gpu.teacher * is_cpu) * ranks,
        "student": gpu.student * is_cpu * ranks + saved,
        "optimizer": gpu.optimizer * is_cpu * ranks,
        "activations": gpu.activations * is_cpu * ranks,
        "loss": gpu.loss * is_cpu * ranks,
        **{name: size * ranks for name, size in prefetched.items()},
    }
    reserved = RESERVED_ON_HOST * ranks
    if is_cpu:
        peak = gpu.tensors * ranks + saved + of["senses"] + of["batches"] + reserved
    else:
        peak = sum(of.values()) + reserved
    return Parts(**of, reserved=reserved, peak=peak, peak_moment=gpu.peak_moment if is_cpu else "a checkpoint")


@dataclass(frozen=True)
class StageMemory:
    """The memory that a stage needs. Stages before training only run the teacher, with its output matrix."""

    name: str
    gpu: int  # bytes of each GPU
    host: int  # bytes of each host


def stages_before(
    config: Config, cluster: Cluster, architecture: Architecture, teacher: Shapes, *, states: int, rows: int
) -> tuple[StageMemory, StageMemory]:
    """Computes the memory that gathering states and annotation need; the other arguments are as in
    :func:`compute_memory`. All gathered states take at most `states` bytes, and the sense dictionary at most `rows`
    bytes.
    """
    size, dtype = cluster.dtype(config.precision).itemsize, cluster.dtype(config.precision)
    hidden_size = architecture.values()["hidden_size"]
    held, on_host, gathered = _teacher(config, cluster, teacher, size, PERSISTENT_WIDTHS * hidden_size)
    matrix = size * architecture.values()["vocab_size"] * hidden_size
    live = held + matrix + _live(gathered.forward if gathered else 0, size, config, cluster)
    is_cpu = cluster.device == "cpu"
    reserved = RESERVED_ON_HOST if is_cpu else RESERVED_ON_GPU
    # Each stage holds at most its budget, and no more than all states or rows.
    kept_states = min(config.senses.memory_bytes, -(-states // cluster.world_size))
    kept_rows = min(config.annotation.memory_bytes, rows)
    stages = []
    cache = _cache_bytes(config, architecture, size) if config.annotation.continuation_tokens else 0
    for name, sequences, on_device, in_host in (
        ("gathering states", config.senses.batch_size, 0, kept_states),
        ("annotation", config.annotation.batch_size, kept_rows + cache, 0),
    ):
        batch = _only_text(batch_of(config, sequences, relations=0.0))
        gpu = live + reserved + on_device + teacher_activations(architecture, batch, dtype)
        columns = config.annotation.store if name == "annotation" else ()
        of_states = batch.length * hidden_size * size
        gpu += batch.size * of_states * (TRUNK_STATES in columns)  # held until the teacher has read the batch
        in_host += (2 * batch.size + SAMPLES_PER_SHARD) * of_states * len(columns)  # two batches, and a shard
        # Without GPUs a rank's tensors are in the host's memory, and `gpu` includes its process.
        host = (on_host + in_host + (gpu if is_cpu else RESERVED_ON_HOST)) * cluster.gpus_per_node
        stages.append(StageMemory(name, gpu, host))
    return stages[0], stages[1]


def _cache_bytes(config: Config, architecture: Architecture, size: int) -> int:
    """Returns the bytes of keys and values for whole prompts that the teacher continues.

    One layer counts twice, because its keys and values are copied when a token is appended.
    """
    values = architecture.values()
    tokens = config.annotation.batch_size * config.corpus.sequence_length
    return tokens * 2 * architecture.key_value_width() * size * (values["num_hidden_layers"] + 1)
