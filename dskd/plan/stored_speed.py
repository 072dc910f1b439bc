"""A comparison of two runs: one reads the teacher's states from the shards, in the other the teacher computes them."""

from dataclasses import dataclass

from dskd.config import Config
from dskd.plan.architecture import Architecture
from dskd.plan.cluster import Cluster
from dskd.plan.disk import states_bytes
from dskd.plan.memory import gather_models
from dskd.plan.shapes import Shapes, plan_student
from dskd.plan.speed import Speed, TeacherPass, compute_speed
from dskd.plan.stored import loads_teacher, reads_states, stored_in_shards, with_stored_states, without_stored_states
from dskd.shards.reading import reads_once


@dataclass(frozen=True)
class StatesComparison:
    """The speeds of both runs, and what storing the states takes."""

    columns: tuple[str, ...]
    is_planned: bool  # the plan is that of the run that reads the states
    reading: Speed
    computing: Speed
    disk: int | None  # bytes of the states in the shards; None if the number of samples is unknown
    storing_s: float | None  # seconds in which the teacher runs over all text once; None if the number is unknown
    reads_once: bool  # the run of the teacher for the dictionary serves annotation, too

    @property
    def gain(self) -> float:
        """Returns how many times as fast a step is that reads the states."""
        return self.computing.step_s / self.reading.step_s

    @property
    def break_even(self) -> float:
        """Returns the share of the given disk bandwidth at which both steps take equally long."""
        return self.reading.reading_s / self.computing.step_s

    @property
    def rate(self) -> float:
        """Returns the bytes/s of states that each GPU reads if no disk limits it."""
        return self.reading.read_bytes / self.reading.step_without_reading_s


def compare_with_stored_states(
    config: Config,
    cluster: Cluster,
    architecture: Architecture,
    teacher: Shapes,
    trunk: int,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    samples: int | None,
) -> StatesComparison | None:
    """Compares the run of `config` with the one that differs in whether it reads stored states.

    Args:
        config: the experiment.
        cluster: the machines.
        architecture: the teacher's.
        teacher: its weights.
        trunk: the number of lowest layers that the student of `config` need not compute.
        micro_batch_size: the number of samples that a rank runs at once.
        accumulation_steps: the number of micro-batches in a step.
        samples: the number of training sequences, or None if it is unknown.

    Returns:
        The comparison, or None if the run reads neither the teacher's states nor stored ones.
    """
    if not (loads_teacher(config) or reads_states(config)):
        return None
    of_reading = with_stored_states(config, trunk) if loads_teacher(config) else config
    of_computing = config if loads_teacher(config) else without_stored_states(config)

    def speed_of(config: Config) -> Speed:
        student = plan_student(config, architecture)
        gathered = gather_models(config, cluster, architecture, teacher, student)
        return compute_speed(
            config,
            cluster,
            architecture,
            teacher,
            student,
            *gathered,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
        )

    reading, computing = speed_of(of_reading), speed_of(of_computing)
    stored = stored_in_shards(of_reading, cluster.dtype(config.precision), architecture.values()["hidden_size"], trunk)
    disk = storing_s = None
    if samples is not None:
        disk = samples * states_bytes(of_reading, stored)
        tokens = config.annotation.batch_size * config.corpus.sequence_length
        gathered, _ = gather_models(
            of_computing, cluster, architecture, teacher, plan_student(of_computing, architecture)
        )
        flops = computing.flops_per_token["teacher_layers"] * tokens
        once = TeacherPass.of(of_computing, cluster, teacher, gathered, flops)
        storing_s = samples / cluster.world_size / config.annotation.batch_size * once.seconds
    return StatesComparison(
        of_reading.annotation.store,
        not loads_teacher(config),
        reading,
        computing,
        disk,
        storing_s,
        reads_once(of_reading),
    )
