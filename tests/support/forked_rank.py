"""What a rank that a test starts runs. Ranks are forked from a server that has imported everything already: to import
takes each of them longer than what most tests are about. Nothing else is different from a start by a launcher."""

import ctypes
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

import torch

import dskd.cli.program
import dskd.evaluation.held_out_text
import dskd.senses.build
import dskd.shards.annotate
import dskd.training.train  # noqa: F401

_CLONE_NEWNS, _CLONE_NEWUTS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000000, 0x1000, 0x4000, 0x40000
_SHARED_MEMORY = "/dev/shm"


def run_launcher(program: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Runs a program of `launcher/`; everything it prints goes to `log`."""

    def run() -> None:
        sys.argv = [str(program), *arguments]
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")

    run_as_rank(run, environment, log)


def run_launcher_on_node(
    program: str, arguments: list[str], nodes: list[tuple[str, Path]], environment: dict[str, str], log: Path
) -> None:
    """Like :func:`run_launcher`, on one of so many nodes that have equally many ranks each: a node is a host name and
    a folder for shared memory, which only its own ranks see."""
    rank, ranks_per_node = int(environment["RANK"]), int(environment["WORLD_SIZE"]) // len(nodes)
    name, memory = nodes[rank // ranks_per_node]
    libc = ctypes.CDLL(None, use_errno=True)
    _require(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS))
    _require(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))  # what is mounted here is seen here only
    _require(libc.mount(bytes(memory), _SHARED_MEMORY.encode(), None, _MS_BIND, None))
    socket.sethostname(name)
    # One of the node's own: that of the fork server would remove segments of these names where it sees them itself.
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    local = {"LOCAL_RANK": str(rank % ranks_per_node), "LOCAL_SIZE": str(ranks_per_node)}
    # The loopback, for nobody can resolve the new name; and a server that is away is noticed at once.
    own = {**environment, **local, "GLOO_SOCKET_IFNAME": "lo", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    run_launcher(Path(__file__).parent.parent.parent / "launcher" / program, arguments, own, log)


def node_namespaces(folder: Path, names: list[str]) -> list[tuple[str, Path]]:
    """Nodes for :func:`run_launcher_on_node`."""
    nodes = [(name, folder / f"shm-{name}") for name in names]
    for _, memory in nodes:
        memory.mkdir()
    return nodes


def why_no_nodes() -> str | None:
    """Why this process cannot make nodes; None when it can."""
    tried = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True)
    return f"no nodes with host names of their own: {tried.stderr.decode().strip()}" if tried.returncode else None


def _require(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


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
