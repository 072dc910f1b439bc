"""Teacher and student of a work directory, loaded as training loads them."""

from dskd.config import Config
from dskd.distributed.world import World
from dskd.models.files.folder import find_teacher
from dskd.students.student import find_student
from dskd.training.models.pair import ModelPair, load_pair
from dskd.training.models.teacher_source import TeacherSource


def load_models(config: Config, world: World) -> ModelPair:
    """Loads both models of a run whose shards have no states."""
    return load_pair(
        config,
        world,
        find_teacher(config),
        find_student(config),
        source=TeacherSource.of(config),
        margin=1.0,
        accumulation_steps=1,
    )
