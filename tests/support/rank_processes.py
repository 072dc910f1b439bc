"""Processes that run the ranks of a program, forked from a server that has imported everything (see forked_rank.py)."""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from repository import REPOSITORY

from dskd.config import Config
from dskd.distributed.rendezvous import free_port
from dskd.distributed.world import World

ONE_RANK = World(0, 1, 0, torch.device("cpu"))
_NUMBERS = itertools.count()  # of the files to which ranks print


@dataclass(frozen=True)
class Finished:
    """A program that has ended."""

    exit_code: int
    output: str


class Rank:
    """A process that was started by :func:`start_ranks`."""

    def __init__(self, process: Any, log: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._exit_code: int | None = None  # after `kill`
        self._log = log

    def is_running(self) -> bool:
        """Returns True until it has ended."""
        return self._exit_code is None and self._process.is_alive()

    def wait(self, timeout_s: float) -> int:
        """Waits for its end and returns its exit code, which is negative if a signal ended it."""
        if self._exit_code is None:
            self._process.join(timeout_s)
            assert not self.is_running(), f"still runs after {timeout_s} s; so far:\n{self.output}"
        return self._process.exitcode if self._exit_code is None else self._exit_code

    def kill(self) -> None:
        """Kills it and its children if it still runs, and closes its pipes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._exit_code is None:
            self._process.join(10)
            self._exit_code = self._process.exitcode
            self._process.close()

    @property
    def output(self) -> str:
        """The text that it has printed so far."""
        return self._log.read_text()


def run_program(
    name: str, config: Path, *arguments: str, ranks: int = 1, timeout_s: int = 240, check: bool = True
) -> Finished:
    """Runs a program of `launcher/` on `ranks` ranks, with the variables that a launcher sets."""
    return finish(start_ranks(name, config, *arguments, ranks=ranks), timeout_s, check=check)


def start_ranks(name: str, config: Path, *arguments: str, ranks: int = 1, absent: Collection[int] = ()) -> list[Rank]:
    """Starts the ranks of a program of `launcher/`, except those in `absent`, and returns at once."""
    from forked_rank import run_launcher

    program = REPOSITORY / "launcher" / name
    return fork_ranks(run_launcher, program, ["--config", str(config), *arguments], ranks=ranks, absent=absent)


def wait_for_checkpoint(config: Config, timeout_s: float = 120) -> None:
    """Waits until the config's run has a checkpoint, or the time is over."""
    from dskd.training.checkpoints import checkpoint

    deadline = time.monotonic() + timeout_s
    while checkpoint.latest(config) is None and time.monotonic() < deadline:
        time.sleep(0.02)


def finish(processes: Sequence[Rank], timeout_s: float = 240, *, check: bool = True) -> Finished:
    """Waits for ranks; with `check`, the exit code of each must be 0."""
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    finished = Finished(max(codes, key=abs), "\n".join(process.output for process in processes))
    if check:
        assert not any(codes), finished.output
    return finished


def fork_ranks(
    target: Callable[..., None],
    *arguments: Any,
    ranks: int = 1,
    absent: Collection[int] = (),
    log: Path | None = None,
    **options: Any,
) -> list[Rank]:
    """Starts `target(*arguments, environment, log, **options)` on every rank of a job, except those in `absent`.

    Their output is appended to `log`; by default each rank has a file of its own.
    """
    context = _fork_server()
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    started = []
    for rank in sorted(set(range(ranks)) - set(absent)):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        path = log or _logs() / f"{next(_NUMBERS)}.txt"
        path.touch()
        process = context.Process(target=target, args=(*arguments, environment, path), kwargs=options)
        process.start()
        started.append(Rank(process, path))
    return started


@functools.cache
def _fork_server() -> Any:
    # For what it preloads, the server uses no other path than Python's own.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*(str(REPOSITORY / place) for place in ("tests/support", ".")), *([before] if before else [])]
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["frozen_imports"])
    first = context.Process(target=os.getpid)  # the server starts, and imports, with its first process
    first.start()
    first.join()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


@functools.cache
def _logs() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dskd-test-logs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
