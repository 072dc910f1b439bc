"""An estimate of how long training takes, from floating-point operations, bytes that travel, and assumed rates.

A multiply-add of a matrix product counts as two operations, as in benchmarks/flops.py. On GPUs, weights are gathered,
and copied from the host's memory, while earlier layers compute, and gradients are summed while those of lower layers
are computed, so a pass takes as long as the longer of computation and transfer. Without GPUs nothing overlaps. Norms,
the optimizer and checkpoints are left out because they are small. The loader works ahead, so it counts only if a node
needs longer to read the stored states of a step than its ranks need for the step.
"""

from dataclasses import dataclass
from typing import Any

from dskd.config import Config
from dskd.models.files.weights import LAYER_NAME
from dskd.plan.architecture import Architecture
from dskd.plan.cluster import Cluster
from dskd.plan.gathering import Gathered
from dskd.plan.running import experts_per_token
from dskd.plan.shapes import Shapes, StudentShapes
from dskd.plan.stored import columns_read, loads_teacher
from dskd.training.models.teacher_source import TeacherSource, reads_logits
from dskd.training.models.width_map import has_width_map


@dataclass(frozen=True)
class Speed:
    """The speed of training."""

    flops_per_token: dict[str, float]  # by part of the step
    step_s: float  # seconds of an optimizer step
    tokens_per_s: float  # of all ranks together
    network_share: float  # of a step: weights or gradients travel between ranks
    waiting_share: float  # of a step: ranks wait for data, from ranks, hosts or disks, and compute nothing
    teacher_s: float  # while the teacher runs, with what travels for it
    reading_s: float  # while a node reads the stored states of all of its ranks from disk
    read_bytes: int  # of stored states, by each rank
    step_without_reading_s: float  # if no disk limited it


def compute_speed(
    config: Config,
    cluster: Cluster,
    architecture: Architecture,
    teacher: Shapes,
    student: StudentShapes,
    teacher_gathered: Gathered | None,
    student_gathered: Gathered,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
) -> Speed:
    """Estimates how long a step takes on the machines."""
    size = cluster.dtype(config.precision).itemsize
    parts = flops_per_token(config, architecture, teacher, student)
    tokens = micro_batch_size * config.corpus.sequence_length
    teacher_pass = TeacherPass.of(config, cluster, teacher, teacher_gathered, parts["teacher_layers"] * tokens)
    student_compute_s = (sum(parts.values()) - parts["teacher_layers"]) * tokens / cluster.flops
    student_network = size * _others(cluster) * (student_gathered.travelled + student.shapes.trained_numel)
    student_network /= cluster.bandwidth
    # On GPUs transfer and computation overlap within the teacher's pass and within the student's passes.
    student_s = (
        max(student_compute_s, student_network) if cluster.device == "cuda" else student_compute_s + student_network
    )
    read_bytes = accumulation_steps * tokens * read_bytes_per_token(config, architecture, student, size)
    reading_s = read_bytes * cluster.gpus_per_node / cluster.disk_bandwidth
    without_reading_s = accumulation_steps * (teacher_pass.seconds + student_s)
    step_s = max(without_reading_s, reading_s)
    return Speed(
        parts,
        step_s,
        tokens_per_s=config.train.global_batch_size * config.corpus.sequence_length / step_s,
        network_share=min(1.0, accumulation_steps * (teacher_pass.network_s + student_network) / step_s),
        waiting_share=1 - accumulation_steps * (teacher_pass.compute_s + student_compute_s) / step_s,
        teacher_s=accumulation_steps * teacher_pass.seconds,
        reading_s=reading_s,
        read_bytes=read_bytes,
        step_without_reading_s=without_reading_s,
    )


def read_bytes_per_token(config: Config, architecture: Architecture, student: StudentShapes, size: int) -> int:
    """Returns the bytes of stored states that training reads for a token; `size` is that of a number."""
    return len(columns_read(config, student.trunk)) * size * int(architecture.values()["hidden_size"])


@dataclass(frozen=True)
class TeacherPass:
    """The seconds of one forward pass of the teacher, by what they are spent on."""

    compute_s: float
    network_s: float
    seconds: float  # of the whole pass

    @classmethod
    def of(
        cls, config: Config, cluster: Cluster, teacher: Shapes, gathered: Gathered | None, flops: float
    ) -> "TeacherPass":
        """Estimates a pass of `flops` operations; one without operations takes no time."""
        if not flops:
            return cls(0.0, 0.0, 0.0)
        size = cluster.dtype(config.precision).itemsize
        compute = flops / cluster.flops
        network = 0.0 if gathered is None else size * _others(cluster) * gathered.travelled / cluster.bandwidth
        offload = _offload_s(config, cluster, teacher, size)
        overlaps = cluster.device == "cuda"
        seconds = max(compute, network + offload) if overlaps else compute + network + offload
        return cls(compute, network, seconds)


def _others(cluster: Cluster) -> float:
    """Returns the share of what is gathered that a rank receives from others, because it is not its own."""
    return (cluster.world_size - 1) / cluster.world_size


def _offload_s(config: Config, cluster: Cluster, teacher: Shapes, size: int) -> float:
    """Returns the seconds for copying a rank's share of an offloaded teacher to its GPU, once per micro-batch."""
    if config.teacher.mode == "resident" or cluster.device == "cpu":
        return 0.0
    share = teacher.share(cluster.world_size) * size
    if config.teacher.offload == "cpu":
        return share / cluster.host_bandwidth
    if config.teacher.offload == "nvme":
        return share * cluster.gpus_per_node / cluster.disk_bandwidth + share / cluster.host_bandwidth
    return 0.0


def flops_per_token(
    config: Config, architecture: Architecture, teacher: Shapes, student: StudentShapes
) -> dict[str, float]:
    """Returns the FLOPs of a training step per token, by part of the step."""
    values, values_of_student = architecture.values(), student.architecture.values()
    with_teacher, length = loads_teacher(config), config.corpus.sequence_length
    # Forward: two operations per matrix element, and scores and weighted sum of attention.
    attention, attention_of_teacher = _attention(values_of_student, length), _attention(values, length)
    teacher_layers = _layers(teacher, _share_of_experts(values))
    student_layers = _layers(student.shapes, _share_of_experts(values_of_student))
    # Backward: gradients of states are computed down to the lowest trained layer. They take the operations of forward
    # for the matrices, and twice those for attention. Trained layers also need gradients of their matrices, which take
    # the operations of forward again. Checkpointing runs the forward of all these layers a second time.
    trained = {number for number, (_, is_trained) in student_layers.items() if is_trained}
    embeddings_trained = next(iter(student.shapes.weights)).is_trained
    lowest = -1 if embeddings_trained and not student.trunk else min(trained, default=len(student_layers))
    backward = recomputed = 0.0
    for number, (matrices, is_trained) in student_layers.items():
        if number >= lowest:
            backward += 2 * attention + (4 if is_trained else 2) * matrices
            recomputed += (attention + 2 * matrices) * config.train.activation_checkpointing
    head, head_of_teacher = (2.0 * each["hidden_size"] * each["vocab_size"] for each in (values_of_student, values))
    own, width = (each["hidden_size"] for each in (values_of_student, values))
    of_map = 2.0 * own * width * has_width_map(config.loss, own, width)
    of_teacher_logits = head_of_teacher * reads_logits(TeacherSource.planned(config).kind, config.loss)
    return {
        "teacher_layers": sum(2 * matrices + attention_of_teacher for matrices, _ in teacher_layers.values())
        * with_teacher,
        "student_layers": sum(2 * matrices + attention for matrices, _ in student_layers.values()),
        "backward_layers": backward + recomputed,
        # Products with the output matrix at the positions that are drawn: the student's logits, the gradients of its
        # states, the gradient of the matrix if it is trained, and the teacher's logits if the loss reads them. And
        # products with the width map, at all positions.
        "head": config.loss.position_share * ((2 + student.trains_head) * head + of_teacher_logits) + 3 * of_map,
    }


def forward_flops(architecture: Architecture, shapes: Shapes, length: int) -> float:
    """Returns the FLOPs of a model's forward pass for a token that has `length` tokens around it, with its logits."""
    values = architecture.values()
    attention = _attention(values, length)
    layers = _layers(shapes, _share_of_experts(values)).values()
    return sum(2 * matrices + attention for matrices, _ in layers) + 2.0 * values["hidden_size"] * values["vocab_size"]


def _attention(values: dict[str, Any], length: int) -> float:
    """Returns the operations of a layer's attention for a token; half of the pairs of positions are masked."""
    heads = values["num_attention_heads"]
    width = heads * (values.get("head_dim") or values["hidden_size"] // heads)
    return 4 * (length / 2) * width


def _layers(shapes: Shapes, share_of_experts: float = 1.0) -> dict[int, tuple[float, bool]]:
    """Returns, for each layer, the elements of its matrices that process a token, and whether it is trained."""
    layers: dict[int, tuple[float, bool]] = {}
    for weight in shapes.weights:
        layer = LAYER_NAME.search(weight.name)
        if layer is not None:
            numel, trained = layers.get(int(layer.group(1)), (0, False))
            met = weight.numel * weight.is_matrix * (share_of_experts if ".experts." in weight.name else 1)
            layers[int(layer.group(1))] = (numel + met, trained or weight.is_trained)
    return layers


def _share_of_experts(values: dict[str, Any]) -> float:
    """Returns the share of a mixture's experts that process a token; 1 without experts."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    count = next((value for key in keys if isinstance(value := values.get(key), int) and value), 1)
    return min(1.0, experts_per_token(values) / count)
