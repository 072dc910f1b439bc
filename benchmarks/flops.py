"""The number of floating-point operations in a training step: two for each multiply-add of its matrix products.

Nothing else is counted: no norms, softmax or optimizer, and nothing that an implementation computes twice. In attention
only the half of the products that the causal mask leaves is counted. Backward costs twice forward if inputs and weights
have gradients, and as much as forward if the weights are frozen and a gradient only passes through.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The shapes of a Llama-like teacher and of the student that is cut from it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    teacher_layers: int
    student_layers: int
    trained_layers: int  # number of the student's last layers that are trained
    sequence_length: int

    def layer_flops(self, *, causal: bool = True) -> float:
        """Returns the FLOPs of one layer's forward pass for one token; without `causal`, no product is masked."""
        kv_size = self.hidden_size * self.num_kv_heads // self.num_heads
        weights = 2 * self.hidden_size * (self.hidden_size + kv_size) + 3 * self.hidden_size * self.intermediate_size
        attended = self.sequence_length * (0.5 if causal else 1)
        return 2 * weights + 4 * attended * self.hidden_size

    @property
    def head_flops(self) -> float:
        """FLOPs of the product of one state with the output matrix."""
        return 2.0 * self.hidden_size * self.vocab_size


def step_flops(
    shape: Shape,
    *,
    shared_trunk: bool,
    stored_states: bool = False,
    causal: bool = True,
    position_share: float = 1.0,
) -> dict[str, float]:
    """Returns the FLOPs of a training step for one token, by part.

    Args:
        shape: teacher and student.
        shared_trunk: whether the student's frozen layers cost nothing, because the teacher computes them, or because
            their states are stored too.
        stored_states: whether the teacher's states are read from the shards. No layer of the teacher runs then, but
            the head still computes its logits from them.
        causal: whether the causal mask halves the products of attention.
        position_share: the share of the positions at which the head computes.
    """
    layer = shape.layer_flops(causal=causal)
    return {
        "teacher_layers": shape.teacher_layers * layer * (not stored_states),
        "student_layers": (shape.trained_layers if shared_trunk else shape.student_layers) * layer,
        "backward_layers": shape.trained_layers * 2 * layer,
        # The student's logits, the gradient of its states through the frozen matrix, and the teacher's logits.
        "head": position_share * 3 * shape.head_flops,
    }
