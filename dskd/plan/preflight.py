"""Preflight: a check of a job's nodes that takes seconds and names what is wrong, before hours are spent on the job.

Every rank examines its own node and reports what it finds. If ranks should agree and do not, the ones that differ from
the majority are named. Preflight changes nothing that training needs.
"""

import contextlib
import os
import platform
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.disk_space import nearest_existing
from dskd.artifacts.files import make_folder
from dskd.artifacts.lock import hold_lock, release_lock
from dskd.artifacts.manifest import package_versions
from dskd.config import Config
from dskd.console import say, table
from dskd.distributed.collectives import barrier, broadcast_json, gather_json, sum_over_ranks
from dskd.distributed.node_cache import open_node_cache
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError, listed
from dskd.models.gguf.teacher import check_file
from dskd.plan import GB

_CLOCK_TOLERANCE_S = 2.0  # if clocks differ by more, logs and metrics of two nodes cannot be compared by time
_SMALLEST_SHARED_MEMORY_GB = 1.0  # the loader's workers pass batches through it
_REDUCED = 2**24  # elements of the sum over ranks: 64 MB
_ROUNDS = 3
_FOLDER = ".preflight-"  # prefix of a folder in workdir; each preflight appends a token of its own
_LEFTOVER_AFTER_S = 24 * 3600.0  # a folder older than this belongs to no running preflight
_SHARED = "workdir has to be on storage that all nodes share"


def preflight(config: Config, world: World) -> None:
    """Checks ranks, storage, clocks, versions and shards, and prints one line per node. Raises a UserError with all
    problems and their nodes, or an OutageError if only some nodes have one, so that the job may run on others.
    """
    gigabytes_per_s = _reduce(world)
    own_report = _look(config, world) | {"reduced": gigabytes_per_s > 0, "rate": gigabytes_per_s}
    reports = gather_json(own_report)
    nodes = Counter(_node(report) for report in reports)
    reports = [report | {"ranks_on_node": nodes[_node(report)]} for report in reports]
    for line in describe(reports):
        say(line)
    problems = find_problems(reports)
    if problems:
        everywhere = all(
            any(report["problems"] for report in reports if report["host"] == host)
            for host in {report["host"] for report in reports}
        )
        error = UserError if everywhere else OutageError
        raise error(listed("preflight: the nodes are not ready for training", problems), known_to_all_ranks=True)
    say("preflight: all checks passed")


def _node(report: Mapping[str, Any]) -> int:
    """Returns the number of the first rank on a rank's node, which identifies the node even if hostnames do not."""
    return int(report["rank"] - report["local_rank"])


def find_problems(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns sentences on everything that is wrong in the reports of all ranks."""
    problems = []
    for report in reports:
        where = f"rank {report['rank']} ({report['host']})"
        if not report["reduced"]:
            problems.append(f"{where}: a sum over all ranks was wrong there; do not use this node")
        problems += [f"{where}: {text}" for text in report["problems"]]
    leaders = [report for report in reports if report["local_rank"] == 0]
    problems += _wrong_clocks(leaders)
    for what, remedy in (
        ("versions", "install the same environment on every node"),
        ("device", "use nodes of one kind"),
        ("ranks_on_node", "start as many ranks on every node"),
    ):
        problems += _odd_ones(leaders, what, remedy)
    return problems


def describe(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines of a table with one row per node."""
    header = ("node", "ranks", "device", "free, GB", "shared memory, GB", "all-reduce, GB/s")
    rows = []
    for leader in (report for report in reports if report["local_rank"] == 0):
        ranks = [report for report in reports if report["host"] == leader["host"]]
        slowest = min(report["rate"] for report in ranks)
        free, shared = (leader[name] for name in ("free_gb", "shared_memory_gb"))
        rows.append(
            [leader["host"], str(len(ranks)), leader["device"], f"{free:,.0f}", f"{shared:.1f}", f"{slowest:.2f}"]
        )
    return table(header, rows).splitlines()


def _odd_ones(reports: Sequence[Mapping[str, Any]], what: str, remedy: str) -> list[str]:
    """Returns sentences on the reports whose `what`, a value or a mapping, differs from the majority's."""

    def values(report: Mapping[str, Any]) -> Mapping[str, Any]:
        return report[what] if isinstance(report[what], Mapping) else {what.replace("_", " "): report[what]}

    differences = []
    for name in sorted({name for report in reports for name in values(report)}):
        counts = Counter(values(report).get(name) for report in reports).most_common(2)
        usual = counts[0][0]
        if len(counts) == 2 and counts[0][1] == counts[1][1]:  # there is no majority
            hosts = [[r["host"] for r in reports if values(r).get(name) == value] for value, _ in counts]
            seen = "; ".join(f"{value} on {', '.join(on)}" for (value, _), on in zip(counts, hosts, strict=True))
            differences.append(f"{name} differs: {seen}; {remedy}")
            continue
        for report in reports:
            own = values(report).get(name)
            if own != usual:
                differences.append(f"{report['host']}: {name} {own}, elsewhere {usual}; {remedy}")
    return differences


def _wrong_clocks(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns sentences on clocks that are far from the median; with two nodes, on their difference.

    There is one report per node.
    """
    clocks = sorted((report["clock_s"], report["host"]) for report in reports)
    if len(clocks) == 2:
        (early, slow), (late, fast) = clocks
        if late - early <= _CLOCK_TOLERANCE_S:
            return []
        return [f"the clocks of {slow} and {fast} are {late - early:.0f} s apart ({fast}'s is ahead); set them (NTP)"]
    usual = statistics.median(clock for clock, _ in clocks)
    return [
        f"{host}: its clock is {abs(clock - usual):.0f} s {'ahead' if clock > usual else 'behind'}; set it (NTP)"
        for clock, host in clocks
        if abs(clock - usual) > _CLOCK_TOLERANCE_S
    ]


def _reduce(world: World) -> float:
    """Returns the GB/s of a sum over all ranks, or 0 if the result is wrong on this rank."""
    expected = world.world_size * (world.world_size - 1) / 2
    seconds = []
    for _ in range(_ROUNDS):
        values = torch.full((_REDUCED,), float(world.rank), device=world.device)
        barrier()
        started = time.perf_counter()
        total = sum_over_ranks(values)
        is_right = bool((total == expected).all())  # reading the result also waits for the GPU
        seconds.append(time.perf_counter() - started)
        if not is_right:
            return 0.0
    return 4 * _REDUCED / min(seconds) / GB


def _look(config: Config, world: World) -> dict[str, Any]:
    """Returns this rank's report on its node."""
    problems = [*_check_storage(config, world), *_check_shards(config), *_check_cache(config, world)]
    if world.is_main and config.teacher.is_gguf and not config.path(kinds.TEACHER.folder).exists():
        problems += _problems_of(lambda: check_file(config))  # rank 0's node makes the teacher
    barrier()
    clock_s = time.time()  # ranks read their clocks within the few milliseconds in which they leave the barrier
    shared = Path("/dev/shm")
    shared_gb = shutil.disk_usage(shared).total / GB if shared.is_dir() else 0.0
    if config.train.num_workers and shared_gb < _SMALLEST_SHARED_MEMORY_GB:
        problems.append(
            f"/dev/shm has {shared_gb:.2f} GB, and the loader's workers pass batches through it; give the container at "
            f"least {_SMALLEST_SHARED_MEMORY_GB:.0f} GB (docker: --shm-size), or set train.num_workers=0"
        )
    is_cuda = world.device.type == "cuda"
    return {
        "rank": world.rank,
        "local_rank": world.local_rank,
        "host": socket.gethostname(),
        "clock_s": clock_s,
        "versions": {"python": platform.python_version(), **package_versions()},
        "device": torch.cuda.get_device_name(world.device) if is_cuda else "cpu",
        "free_gb": shutil.disk_usage(nearest_existing(config.path())).free / GB,
        "shared_memory_gb": shared_gb,
        "problems": problems,
    }


def _check_storage(config: Config, world: World) -> list[str]:
    """Checks that all ranks see one work directory and can lock files there, and returns this rank's problem, if any.

    Each rank must find the folder that rank 0 made, and rank 0 must find the file that each rank wrote into it. If only
    one node has a fault, only its ranks report a problem, which distinguishes a bad node from a mistake of the user.
    """
    problem, token = None, None
    if world.is_main:
        token = os.urandom(16).hex()
        try:
            _remove_leftovers(config.path())
            make_folder(config.path(f"{_FOLDER}{token}"))
        except UserError as error:
            problem, token = f"{error}; {_SHARED}", None
    token = broadcast_json(token)
    # The folder belongs to this preflight alone, since several jobs may start at once on one work directory, such as
    # two runs to be compared.
    folder = config.path(f"{_FOLDER}{token}")
    if not world.is_main:
        try:
            if token is not None:
                (folder / f"rank-{world.rank}").touch()
            # Rank 0 could not make the folder. If other ranks can write there, the fault is that of rank 0's node.
            elif not ((parent := nearest_existing(config.path())).is_dir() and os.access(parent, os.W_OK)):
                problem = f"{config.path()}: cannot write there; {_SHARED}"
        except OSError as error:
            problem = f"{config.path()} is not the folder that rank 0 writes to ({error.strerror}); {_SHARED}"
    if problem is None and token is not None:
        problem = next(iter(_problems_of(lambda: _try_lock(folder / f"lock-{world.rank}"))), None)
    reports = gather_json(problem)
    if world.is_main and problem is None:
        # Ranks with a problem of their own report it themselves, so only check the others' files.
        sound = [rank for rank, own in enumerate(reports) if own is None and rank != 0]
        if missing := [rank for rank in sound if not (folder / f"rank-{rank}").exists()]:
            problem = f"{config.path()}: files that ranks {missing} wrote there are not visible here"
    barrier()
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return [problem] if problem else []


def _remove_leftovers(workdir: Path) -> None:
    """Removes the folders of preflights that were killed."""
    for folder in workdir.glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):  # another job's preflight may have just removed it
            if time.time() - folder.stat().st_mtime > _LEFTOVER_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _try_lock(path: Path) -> None:
    hold_lock(path, "checks that files can be locked")
    release_lock(path)


def _problems_of(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except UserError as problem:
        return [str(problem)]
    return []


def _check_shards(config: Config) -> list[str]:
    """Checks that this rank's node can read the training shards, if they exist; returns its problem, if any."""
    if not config.path(kinds.SHARDS.folder, "train").exists():
        return []
    problems = _problems_of(lambda: shards.load_manifest(config, "train"))
    if not problems and config.train.shard_remote is not None:
        problems = _problems_of(lambda: shards.require_remote(config, "train"))
    return problems


def _check_cache(config: Config, world: World) -> list[str]:
    # The error has the problems of all nodes, each line starting with a host name.
    problems, own = _problems_of(lambda: open_node_cache(config.train.shard_cache, world)), f"{socket.gethostname()}: "
    if not problems or world.local_rank != 0:
        return []
    return [line.removeprefix(own) for line in problems[0].splitlines() if line.startswith(own)]
