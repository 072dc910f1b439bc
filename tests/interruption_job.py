"""What the processes of test_interruption.py run. They are forked from a server that has imported everything already,
so that many can be started, and killed, in a short time."""

import os
import signal
from pathlib import Path

import torch

import dskd.annotate
import dskd.manifest
import dskd.senses.build
from dskd.config_file import load_config
from dskd.distributed import initialize
from dskd.manifest import hash_files


def _die_in_hashing(folder: Path, only: object = None) -> dict:
    """Stands in for the hashing of a new artifact; what is only compared is hashed as ever."""
    if only is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return hash_files(folder, only)


def run(stage: str, config: Path, log: Path, environment: dict[str, str], *, dies_in_hashing: bool = False) -> None:
    """Runs a stage as one rank; everything it prints goes to `log`. It can be made to be killed while it publishes."""
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if dies_in_hashing:
        dskd.manifest.hash_files = _die_in_hashing
    loaded = load_config(config)
    world = initialize(60)
    if stage == "senses":
        dskd.senses.build.build_senses(loaded, world)
    else:
        dskd.annotate.annotate(loaded, world)
    os._exit(0)  # as the programs do: gloo's threads can abort an interpreter that is taken down
