"""Fixtures that tests of several folders share; conftest.py loads them in processes that run tests."""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cluster_lab.slurm
import delayed_collection
import pytest
import torch
import unsynced  # noqa: F401 - for its effect
from cluster_lab import hosts
from cluster_lab.hosts import Lab
from cluster_lab.slurm import Slurm
from tiny_work import NO_RUNS, copy_work, make_database, make_tiny

from dskd.__main__ import main
from dskd.distributed.rendezvous import initialize
from dskd.distributed.world import LAUNCHER_VARIABLES, World
from dskd.tracking import tracker

if TYPE_CHECKING:
    from mlflow_server import Link, Server

torch.set_num_threads(1)  # conftest.py has the reason


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Exempts the modules of tests, and all that they have imported, from garbage collection."""
    delayed_collection.exempt_imports()


def _make_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None], kept: Path | None = None
) -> Path:
    """Returns the folder with that name, or `kept`, which the first of all workers fills by calling `make`."""
    if kept is not None:
        folder = kept.resolve()
    elif "PYTEST_XDIST_WORKER" in os.environ:
        folder = factory.getbasetemp().parent / name  # shared by all workers
    else:
        folder = factory.mktemp(name, numbered=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes it, the others wait
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def no_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to be copied: creating its tables takes longer than most trainings in tests."""
    return _make_once(tmp_path_factory, "no-runs", lambda folder: make_database(folder / NO_RUNS)) / NO_RUNS


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a work directory that the pipeline made on two ranks.

    Its ranks are forked, as in other tests. tests/test_pipeline.py uses DeepSpeed's launcher.
    """

    def make(folder: Path) -> None:
        make_tiny(folder, request.getfixturevalue("no_runs"))

    return _make_once(tmp_path_factory, "tiny", make, request.config.getoption("--tiny")) / "tiny.yaml"


@pytest.fixture(scope="module", autouse=True)
def _exempt_survivors() -> Iterator[None]:
    """Exempts from garbage collection what outlives the tests of a file: modules imported late, and caches."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _launcher_variables() -> Iterator[None]:
    """Restores the launcher's variables after a test.

    Programs of one process remove them, others set them, and DeepSpeed and mosaicml-streaming read them at any time.
    """
    if torch.distributed.is_initialized():  # then a program in a fixture of a whole file may have removed them
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
    names = (*LAUNCHER_VARIABLES, "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _closed_databases() -> Iterator[None]:
    """Closes the connections to MLflow's databases, which MLflow keeps for each file until the process ends."""
    yield
    if store := sys.modules.get("mlflow.store.tracking.sqlalchemy_store"):
        for engine in list(store.SqlAlchemyStore._engine_map.values()):
            if engine.pool.checkedin():
                engine.dispose()


@pytest.fixture(autouse=True)
def _closed_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the shared memory of a test's datasets, which mosaicml-streaming keeps until the process ends."""
    cleanups: list[Callable[[], object]] = []
    register = atexit.register

    def remember(function: Callable[..., object], *args: object, **options: object) -> Callable[..., object]:
        if type(getattr(function, "__self__", None)).__module__ == "streaming.base.shared.memory":
            cleanups.append(function)
        return register(function, *args, **options)

    monkeypatch.setattr(atexit, "register", remember)
    yield
    for cleanup in cleanups:
        with contextlib.suppress(BufferError):  # a dataset of a fixture that lives on
            cleanup()
            atexit.unregister(cleanup)


@pytest.fixture(scope="session")
def world() -> World:
    """One rank in the test's own process, for code that needs DeepSpeed but no second rank.

    With it comes what such code imports late, so that it is exempt from garbage collection too (see above).
    """
    world = initialize()
    importlib.import_module("frozen_imports")
    return world


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two hosts, node1 and node2. Skips the test, with the reason, if this machine cannot have them."""
    if reason := hosts.why_not():
        pytest.skip(reason)
    lab = Lab()
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def slurm(lab: Lab) -> Iterator[Slurm]:
    """A SLURM on the two hosts."""
    if reason := cluster_lab.slurm.why_not():
        pytest.skip(reason)
    slurm = Slurm(lab)
    yield slurm
    slurm.close()


@pytest.fixture
def copy_of_tiny(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config with a work directory that begins with some of the artifacts of `tiny`."""
    return functools.partial(copy_work, tiny, tmp_path)


@pytest.fixture
def dskd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a verb in this process; returns its exit code, and what it prints to standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dskd", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as ended:  # argparse prints a help or refuses an option
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only for this process: for root, who may write everywhere, by a mount."""
    with contextlib.ExitStack() as undo:

        def protect(folder: Path) -> None:
            if os.geteuid():
                mode = folder.stat().st_mode
                folder.chmod(0o500)
                undo.callback(folder.chmod, mode)
                return
            mount = ["mount", "--bind", folder, folder]
            tried = subprocess.run(mount, capture_output=True, text=True)
            if tried.returncode:
                pytest.skip(f"root may write everywhere, and cannot mount here: {tried.stderr.strip()}")
            undo.callback(subprocess.run, ["umount", folder], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

        yield protect


@pytest.fixture
def link(server: "Server", monkeypatch: pytest.MonkeyPatch) -> Iterator["Link"]:
    """A connection to the MLflow server that a test can cut and mend; the tracker waits shortly while it is cut."""
    from mlflow_server import Link

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracker, "_RETRY_AFTER_S", 0.1)
    monkeypatch.setattr(tracker, "_FLUSH_TIMEOUT_IN_HASTE_S", 0.5)
    link = Link(server)
    link.mend()
    yield link
    link.cut()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, no_runs: Path) -> Iterator["Server"]:
    """An MLflow server that runs until the last test ends; it begins without runs."""
    from mlflow_server import Server

    server = Server(tmp_path_factory.mktemp("mlflow"), no_runs)
    server.start()
    yield server
    server.stop()
