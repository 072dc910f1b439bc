"""Code that runs in the ranks that tests start.

Ranks are forked from a server that has imported everything already, because importing takes each of them longer than
what most tests check. In all other respects, a rank starts as a launcher starts it.
"""

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
    """Like :func:`run_launcher`, on one of several simulated nodes, each with the same number of ranks.

    A node has a host name and a folder for shared memory, which only its own ranks see.
    """
    rank, ranks_per_node = int(environment["RANK"]), int(environment["WORLD_SIZE"]) // len(nodes)
    name, memory = nodes[rank // ranks_per_node]
    libc = ctypes.CDLL(None, use_errno=True)
    _require(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS))
    _require(
        libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    )  # mounts of this process stay in its own namespace
    _require(libc.mount(bytes(memory), _SHARED_MEMORY.encode(), None, _MS_BIND, None))
    socket.sethostname(name)
    # The node gets a tracker of its own: the fork server's would remove segments with these names in its own namespace.
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    local = {"LOCAL_RANK": str(rank % ranks_per_node), "LOCAL_SIZE": str(ranks_per_node)}
    # Use the loopback interface, because the new host name cannot be resolved; and do not retry a server that is away.
    own = {**environment, **local, "GLOO_SOCKET_IFNAME": "lo", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    run_launcher(Path(__file__).parent.parent.parent / "launcher" / program, arguments, own, log)


def node_namespaces(folder: Path, names: list[str]) -> list[tuple[str, Path]]:
    """Makes nodes for :func:`run_launcher_on_node`."""
    nodes = [(name, folder / f"shm-{name}") for name in names]
    for _, memory in nodes:
        memory.mkdir()
    return nodes


def why_no_nodes() -> str | None:
    """Returns why this process cannot make nodes, or None if it can."""
    tried = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True)
    return f"no nodes with host names of their own: {tried.stderr.decode().strip()}" if tried.returncode else None


def _require(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run_as_rank(action: Callable[[], None], environment: dict[str, str], log: Path) -> None:
    """Runs an action as one rank, which leads its own process group."""
    os.setsid()
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for its loader's workers, as in a separate program
    action()
