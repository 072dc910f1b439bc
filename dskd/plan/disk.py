"""The disk space that a job's artifacts take."""

from dataclasses import dataclass

from dskd.config import Config
from dskd.models.checks.room import FLOAT32_BYTES
from dskd.plan.architecture import Architecture
from dskd.plan.cluster import Cluster
from dskd.plan.shapes import Shapes, StudentShapes
from dskd.plan.stored import stored_in_shards
from dskd.senses.dictionary import VALUE_BYTES
from dskd.shards import StoredStates, sample_bytes
from dskd.shards.reading import reads_once
from dskd.training.checkpoints.writing import ELEMENT_BYTES


@dataclass(frozen=True)
class Disk:
    """The sizes of a job's artifacts in bytes."""

    states: int  # while the dictionary is built, at most
    senses: int  # of single tokens, at most; spans of several tokens are not counted
    teacher: int  # in the work directory; 0 if it is elsewhere, or is trained from scratch
    student: int
    sample: int  # of the shards, before compression; a node's unpacked copy has the same size
    sample_states: int  # the stored states in a sample
    sample_kept: int  # those of a sample that gathering keeps until the shards are complete; 0 if it keeps none
    samples: int | None  # None if their number is unknown
    checkpoints: int  # of one run: those that are kept, and the one that is being written
    nvme: int  # of the teacher, on each node


def compute_disk(
    config: Config,
    cluster: Cluster,
    architecture: Architecture,
    teacher: Shapes,
    student: StudentShapes,
    *,
    samples: int | None,
    steps: int | None,
) -> Disk:
    """Computes the sizes of a job's artifacts. `samples`, the number of training sequences, and `steps`, that of
    optimizer steps of a run, are None if they are unknown.
    """
    values, dtype = architecture.values(), cluster.dtype(config.precision)
    size, vocab_size, hidden_size = dtype.itemsize, values["vocab_size"], values["hidden_size"]
    stored = stored_in_shards(config, dtype, hidden_size, student.trunk)
    states = vocab_size * config.senses.max_states
    if samples is not None:  # a position gives one state
        states = min(states, samples * config.corpus.sequence_length)
    train = config.train
    checkpoint = ELEMENT_BYTES * student.shapes.trained_numel
    for_good = steps // train.keep_every if train.keep_every and steps else 0
    is_on_disk = config.teacher.mode != "resident" and config.teacher.offload == "nvme"
    is_gguf = config.teacher.is_gguf  # its numbers are stored in float32, and so are those of a student cut from it
    is_cut = config.student.path is None and config.student.from_config is None
    return Disk(
        states * hidden_size * VALUE_BYTES,
        dictionary_rows(config, architecture) * hidden_size * VALUE_BYTES,
        FLOAT32_BYTES * architecture.numel() if is_gguf else 0,
        student.whole_numel * (FLOAT32_BYTES if is_gguf and is_cut else size),
        sample_bytes_of(config, stored),
        states_bytes(config, stored),
        states_bytes(config, stored) if reads_once(config) else 0,
        samples,
        checkpoint * (train.keep_last + 1 + for_good),
        teacher.share(cluster.world_size) * size * cluster.gpus_per_node if is_on_disk else 0,
    )


def sample_bytes_of(config: Config, stored: StoredStates | None) -> int:
    """Returns the bytes of one sample of the shards before compression."""
    annotation = config.annotation
    return sample_bytes(
        config.corpus.sequence_length, kappa=annotation.kappa, teacher_top_n=annotation.teacher_top_n, stored=stored
    )


def states_bytes(config: Config, stored: StoredStates | None) -> int:
    """Returns the bytes of the stored states of one sample, which are included in :func:`sample_bytes_of`."""
    return sample_bytes_of(config, stored) - sample_bytes_of(config, None)


def dictionary_rows(config: Config, architecture: Architecture) -> int:
    """Returns the most rows that the sense dictionary can have: k senses for each token."""
    return architecture.values()["vocab_size"] * config.senses.k
