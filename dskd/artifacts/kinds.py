"""The kinds of artifacts: a single table of their folders, commands and format versions."""

import os
from dataclasses import dataclass
from pathlib import Path

from dskd.config import Config


@dataclass(frozen=True)
class Kind:
    """A kind of artifact.

    Increase `schema_version` by one when the format changes: artifacts of another version are rebuilt by the stage that
    writes them, and refused by those that only read them.
    """

    name: str  # as in manifests
    folder: str  # in the work directory
    made_by: str  # the command that makes it, for messages
    schema_version: int
    missing: str  # for the message if there is none: "there {missing} with `{made_by}`"
    not_hashed: tuple[str, ...] = ()  # files that are written again later, without making it another artifact


LEXICON = Kind("lexicon", "lexicon", "dskd lexicon --config FILE", 2, "is no lexicon here; make it")
WRITTEN = Kind(
    "written",
    "written",
    "python launcher/pipeline.py --config FILE --until written",
    1,
    "are no texts of the teacher here; let it write them",
)
CORPUS = Kind(
    "corpus", "corpus", "python launcher/pipeline.py --config FILE --until corpus", 1, "is no corpus here; make it"
)
TEACHER = Kind(
    "teacher", "teacher", "python launcher/pipeline.py --config FILE --until teacher", 1, "is no teacher here; make it"
)
SEQUENCES = Kind(
    "sequences",
    "sequences",
    "python launcher/pipeline.py --config FILE --until sequences",
    2,
    "are no sequences here; make them",
)
STUDENT = Kind("student", "student", "dskd student --config FILE", 1, "is no student here; make it")
STATES = Kind(
    "states", "states", "deepspeed launcher/build_senses.py --config FILE", 1, "are no states here; make them"
)
READING = Kind(
    "reading", "reading", "deepspeed launcher/build_senses.py --config FILE", 1, "are no kept states here; keep them"
)
SENSES = Kind(
    "senses", "senses", "deepspeed launcher/build_senses.py --config FILE", 1, "is no sense dictionary here; make it"
)
SHARDS = Kind("shards", "shards", "deepspeed launcher/annotate.py --config FILE", 2, "are no shards here; make them")
CHECKPOINT = Kind(
    "checkpoint", "checkpoints", "deepspeed launcher/train.py --config FILE", 1, "is no checkpoint here; make it"
)
EXPORT = Kind(
    "export",
    "export",
    "dskd export --config FILE",
    1,
    "is no export here; make it",
    not_hashed=("README.md",),  # the model card, which evaluations rewrite
)
EVALUATION = Kind(
    "evaluation", "evaluation", "deepspeed launcher/evaluate.py --config FILE", 3, "is no evaluation here; make it"
)
TASK = Kind(
    "task",
    "tasks",
    "deepspeed launcher/evaluate.py --config FILE --tasks",
    1,
    "are no results of this benchmark here; make them",
)
LEXICAL_ITEMS = Kind(
    "lexical-items",
    "lexical_items",
    "deepspeed launcher/evaluate.py --config FILE --lexical",
    1,
    "are no lexical items here; make them",
)
LEXICAL = Kind(
    "lexical",
    "lexical",
    "deepspeed launcher/evaluate.py --config FILE --lexical",
    2,
    "are no lexical measures here; make them",
)

KINDS = {kind.name: kind for kind in list(globals().values()) if isinstance(kind, Kind)}


def checkpoint_folder(config: Config) -> Path:
    """Returns the folder of the checkpoints of the config's run."""
    return config.path(CHECKPOINT.folder, config.run)


def run_lock_path(config: Config, run: str) -> Path:
    """Returns the path of the lock that a process holds while it trains a run.

    If the run's folder is a symbolic link, the lock is next to the real folder, where the processes of other work
    directories find it too. It is in that folder if this user may not write next to it.
    """
    folder = config.path(CHECKPOINT.folder, run)
    if not folder.is_symlink():
        return folder.with_name(f".{run}.lock")
    real = folder.resolve()
    return real.with_name(f".{real.name}.lock") if os.access(real.parent, os.W_OK) else real / ".lock"
