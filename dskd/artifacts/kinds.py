"""The kinds of artifacts: their folders, the commands that make them, and the versions of their formats."""

from pathlib import Path

from dskd.config import Config

FOLDER = "checkpoints"
MADE_BY = "deepspeed launcher/train.py --config FILE"
# Raised by one when the format of a kind changes: artifacts of another version are rebuilt, or refused where they are
# only read.
SCHEMA_VERSIONS = {
    "teacher": 1,
    "corpus": 1,
    "sequences": 2,
    "lexicon": 2,
    "states": 1,
    "senses": 1,
    "shards": 2,
    "student": 1,
    "checkpoint": 1,
    "export": 1,
    "evaluation": 3,
    "task": 1,
    "lexical-items": 1,
    "lexical": 2,
}
MISSING = {
    "senses": "is no sense dictionary here; make it",
    "shards": "are no shards here; make them",
    "sequences": "are no sequences here; make them",
    "states": "are no states here; make them",
}


def folder(config: Config) -> Path:
    """Where the checkpoints of the config's run are."""
    return config.path(FOLDER, config.run)


def lock_path(config: Config, run: str) -> Path:
    """The lock of the one process that may train a run."""
    return config.path(FOLDER, f".{run}.lock")
