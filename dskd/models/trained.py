"""The choice of the student's parameters that are trained, by the keys `student.train_*`."""

from dskd.config import StudentConfig
from dskd.errors import UserError


def trained_layers(student: StudentConfig, count: int) -> set[int]:
    """Returns the indices of the trained layers among the student's `count` layers.

    Raises:
        UserError: if one does not exist.
    """
    named = student.train_layers if isinstance(student.train_layers, tuple) else ()
    if missing := sorted(layer for layer in named if layer >= count):
        raise UserError(f"student.train_layers: the student has layers 0 to {count - 1}, so there is no {missing}")
    return {layer for layer in range(count) if student.trains(layer, count)}


def trains_embeddings(student: StudentConfig, *, tied: bool) -> bool:
    """Returns True if the input embeddings are trained; if they are tied to the head, training either trains both."""
    return student.train_embeddings or (tied and student.train_lm_head)


def trains_head(student: StudentConfig, *, tied: bool) -> bool:
    """Returns True if the output matrix is trained."""
    return student.train_lm_head or (tied and student.train_embeddings)
