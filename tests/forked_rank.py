"""What a rank that a test starts runs. Ranks are forked from a server that has imported everything already: to import
takes each of them longer than what most tests are about. Nothing else is different from a start by a launcher."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import dskd.annotate
import dskd.evaluate
import dskd.program
import dskd.senses.build
import dskd.train  # noqa: F401


def run_launcher(program: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Runs a program of `launcher/`; everything it prints goes to `log`."""

    def run() -> None:
        sys.argv = [str(program), *arguments]
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")

    run_as_rank(run, environment, log)


def run_as_rank(action: Callable[[], None], environment: dict[str, str], log: Path) -> None:
    """Runs an action as one rank, leader of a process group of its own."""
    os.setsid()
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for its loader's workers, as in a program of its own
    action()
