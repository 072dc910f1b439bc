"""The common parts of tests of GPUs: the reason to skip them, and processes that may use GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import REPOSITORY

from dskd.distributed.rendezvous import free_port
from dskd.distributed.world import LAUNCHER_VARIABLES, World

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
# For code that needs no DeepSpeed: in the tests' own process DeepSpeed has been told to use the CPU.
ON_GPU = World(0, 1, 0, GPU)


def launch(program: str, config: Path, *arguments: str, gpus: int = 1) -> str:
    """Runs a program of `launcher/` as users do, and returns what it prints."""
    port = str(free_port())  # several workers at once must not meet at the launcher's default
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus), "--master_port", port]
    return run_on_gpu(*command, str(REPOSITORY / "launcher" / program), "--config", str(config), *arguments)


def run_on_gpu(*command: str, timeout_s: float = 240, **variables: str) -> str:
    """Runs Python with a command line in a process that may use GPUs, and returns what it prints."""
    left = {"DS_ACCELERATOR", "MASTER_ADDR", "MASTER_PORT", *LAUNCHER_VARIABLES}  # these are of the tests' own process
    environment = {name: value for name, value in os.environ.items() if name not in left}
    paths = (str(REPOSITORY), str(REPOSITORY / "tests" / "support"), os.getenv("PYTHONPATH"))
    finished = subprocess.run(
        [sys.executable, *command],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout
