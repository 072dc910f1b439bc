"""The states of the teacher that shards store: which are stored, which a run reads, and runs that differ in that."""

import torch

from dskd.config import Config
from dskd.shards import TEACHER_STATES, TRUNK_STATES, StoredStates
from dskd.training.models.teacher_source import TeacherSource


def loads_teacher(config: Config) -> bool:
    """Returns True if the teacher runs in training."""
    return TeacherSource.planned(config).kind == "loaded"


def reads_states(config: Config) -> bool:
    """Returns True if the loss reads the teacher's states from the shards."""
    return TeacherSource.planned(config).kind == "states"


def columns_read(config: Config, trunk: int) -> tuple[str, ...]:
    """Returns the columns of states that training reads.

    Args:
        config: the experiment.
        trunk: the number of lowest layers that the student need not compute.
    """
    if loads_teacher(config):  # which computes these states
        return ()
    return (TEACHER_STATES,) * reads_states(config) + (TRUNK_STATES,) * (trunk > 0)


def stored_in_shards(config: Config, dtype: torch.dtype, hidden_size: int, trunk: int) -> StoredStates | None:
    """Returns what annotation stores of the teacher's states; None if it stores none."""
    columns = config.annotation.store
    depth = trunk if TRUNK_STATES in columns else 0
    return StoredStates(columns, str(dtype).removeprefix("torch."), hidden_size, depth) if columns else None


def with_stored_states(config: Config, trunk: int) -> Config:
    """Returns the config of the same run that reads from the shards what the teacher of `config` would compute."""
    return _replace(config, "auto", (TEACHER_STATES,) + (TRUNK_STATES,) * (trunk > 0))


def without_stored_states(config: Config) -> Config:
    """Returns the config of the same run in which the teacher computes its states."""
    return _replace(config, "zero3", ())


def _replace(config: Config, mode: str, store: tuple[str, ...]) -> Config:
    teacher = config.teacher.model_copy(update={"mode": mode})
    annotation = config.annotation.model_copy(update={"store": store})
    return config.model_copy(update={"teacher": teacher, "annotation": annotation})
