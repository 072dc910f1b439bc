"""How many floating-point operations a training step needs: two for each multiply-add of its matrix products.

Nothing else is counted (norms, softmax, optimizer), nor is what a formulation computes twice. Of attention only what
the causal mask leaves is counted, half of its products. Backward costs twice forward where inputs and weights have
gradients, and once where weights are frozen and a gradient only passes through.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped teacher and the student that is cut from it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    teacher_layers: int
    student_layers: int
    trained_layers: int  # the student's last
    sequence_length: int

    def layer_flops(self, *, causal: bool = True) -> float:
        """Forward of one layer, for one token; without `causal`, as if no product were masked."""
        kv_size = self.hidden_size * self.num_kv_heads // self.num_heads
        weights = 2 * self.hidden_size * (self.hidden_size + kv_size) + 3 * self.hidden_size * self.intermediate_size
        attended = self.sequence_length * (0.5 if causal else 1)
        return 2 * weights + 4 * attended * self.hidden_size

    @property
    def head_flops(self) -> float:
        """The product of one state with the output matrix."""
        return 2.0 * self.hidden_size * self.vocab_size


def step_flops(shape: Shape, *, shared_trunk: bool, with_teacher: bool = True, causal: bool = True) -> dict[str, float]:
    """FLOPs of a training step for one token, by part.

    With `shared_trunk` the student's frozen layers are not computed: the teacher has done so.
    """
    layer = shape.layer_flops(causal=causal)
    return {
        "teacher_layers": shape.teacher_layers * layer * with_teacher,
        "student_layers": (shape.trained_layers if shared_trunk else shape.student_layers) * layer,
        "backward_layers": shape.trained_layers * 2 * layer,
        # The student's logits, the gradient of its states through the frozen matrix, and the teacher's logits.
        "head": (2 + with_teacher) * shape.head_flops,
    }
