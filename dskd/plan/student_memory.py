"""The bytes of the student's weights and of its optimizer on a rank of training."""

from typing import NamedTuple

from dskd.models.structure.causal_lm import PERSISTENT_WIDTHS, SUB_GROUP
from dskd.plan.cluster import Cluster
from dskd.plan.gathering import gather
from dskd.plan.shapes import StudentShapes
from dskd.training.models.student import GRADIENT_BYTES, MASTER_BYTES, MOMENT_BYTES, REDUCE_BUCKET

# Bytes that the optimizer's step needs for an element: a copy of its gradient and, on a GPU, AdamW's two intermediate
# results; on a CPU AdamW is fused.
_STEP = {"cuda": GRADIENT_BYTES + MOMENT_BYTES, "cpu": GRADIENT_BYTES}


class StudentBytes(NamedTuple):
    """The bytes that a rank holds of the student's weights and its optimizer, all the time and in each phase."""

    held: int  # its shares, and the small weights that stay gathered
    along: list[int]  # gathered while each module runs forward
    at_turn: int  # gathered during the loss
    backward: int  # gathered in the backward pass, at most
    optimizer: int  # the optimizer's share, and the bucket in which DeepSpeed collects gradients
    flushed: int  # the copy of a full bucket, to be summed over ranks
    over: int  # a gradient that is larger than the bucket, which is held separately
    is_flushed_early: bool  # before the backward pass is over
    update: int  # the optimizer's step

    @property
    def during_backward(self) -> int:
        """Returns what the backward pass holds of weights and gradients."""
        return self.backward + self.over + (self.flushed if self.is_flushed_early else 0)

    @property
    def during_sum(self) -> int:
        """Returns what the sum of the gradients over ranks holds of both."""
        return self.backward + self.over + self.flushed

    @property
    def most_weights(self) -> int:
        """Returns the most bytes of weights that exist at once."""
        return self.held + max(*self.along, self.at_turn, self.backward)

    @property
    def most_of_optimizer(self) -> int:
        """Returns the most bytes of the optimizer that exist at once."""
        return self.optimizer + max(self.update, self.flushed + self.over)


def student_bytes(cluster: Cluster, student: StudentShapes, size: int) -> StudentBytes:
    """Computes the bytes of a rank if an element of the weights has `size` bytes."""
    shapes, ranks = student.shapes, cluster.world_size
    is_gloo = cluster.device == "cpu"
    trained, share = shapes.trained_numel, shapes.share(ranks, trained_only=True)
    # Weights. A single rank gathers nothing.
    small = PERSISTENT_WIDTHS * student.architecture.values()["hidden_size"]
    gathered = gather(shapes, persistent=small, backward=True, is_gloo=is_gloo)
    held = size * (shapes.share(ranks) + -(-student.teacher_matrix // ranks))
    if ranks > 1:
        held += size * shapes.persistent(small)
    each = size * (ranks > 1)
    copy = each * student.teacher_matrix  # the teacher's output matrix, if the student's differs from it
    # Gradients. A full bucket is copied to be summed over ranks, except by the only rank on a CPU.
    larger = (weight.numel for weight in shapes.weights if weight.is_trained and weight.numel > REDUCE_BUCKET)
    return StudentBytes(
        held,
        [each * elements for elements in gathered.along],
        each * gathered.at_turn + copy,
        each * gathered.backward + copy,
        optimizer=(MASTER_BYTES + MOMENT_BYTES + GRADIENT_BYTES) * share + REDUCE_BUCKET * size,
        flushed=min(trained, REDUCE_BUCKET) * (each if is_gloo else size),
        over=max(larger, default=0) * size,
        is_flushed_early=trained > REDUCE_BUCKET,
        update=_STEP[cluster.device] * min(share, SUB_GROUP),
    )
