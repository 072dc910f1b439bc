"""What the processes of test_interruption.py run. They are forked from a server that has imported everything already,
so that many can be started, and killed, in a short time."""

import os
from pathlib import Path

import torch

import dskd.annotate
import dskd.senses.build
from dskd.config_file import load_config
from dskd.distributed import initialize


def run(stage: str, config: Path, log: Path, environment: dict[str, str]) -> None:
    """Runs a stage as one rank; everything it prints goes to `log`."""
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    loaded = load_config(config)
    world = initialize(60)
    if stage == "senses":
        dskd.senses.build.build_senses(loaded, world)
    else:
        dskd.annotate.annotate(loaded, world)
    os._exit(0)  # as the programs do: gloo's threads can abort an interpreter that is taken down
