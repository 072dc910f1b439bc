"""Faults of clusters: a full disk, missing shards, a slow rank. A run reports them, and resumes afterwards."""

import errno
import os
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from forked_rank import run_launcher_on_node, why_no_nodes
from rank_processes import finish, fork_ranks, run_program, start_ranks
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_work import BEFORE_TRAINING, TINY
from tracked_results import losses_of

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.manifest import Recipe
from dskd.cli.program import run
from dskd.config.reading import load_config
from dskd.distributed import shared_memory
from dskd.training.checkpoints import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size at a folder, and enlarges it."""
    if os.geteuid():
        pytest.skip("to mount a small file system needs root")
    mounted = []

    def resize(folder, size_bytes):
        options = f"size={size_bytes}"
        if folder in mounted:
            options += ",remount"
        else:
            folder.mkdir(parents=True)
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"a file system cannot be mounted here: {tried.stderr.strip()}")
        mounted.append(folder)

    yield resize
    for folder in set(mounted):
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_the_run_before_a_checkpoint_is_half_written(tiny, copy_of_tiny, small_disk):
    settings = {**TINY["train"], "checkpoint_every": 2, "keep_last": 1}
    config = copy_of_tiny(*BEFORE_TRAINING, train=settings)
    loaded = load_config(config)
    newest = checkpoint.latest(load_config(tiny))
    size = sum(entry["size_bytes"] for entry in newest.manifest.files.values())
    small_disk(loaded.path("checkpoints"), int(1.9 * size))
    ended = run_program("train.py", config, ranks=2, check=False)
    assert ended.exit_code == 2, ended.output
    assert ended.output.count("error: ") == 1
    assert re.search(r"space for a checkpoint: \d\.\d\d MB are needed, but only \d\.\d\d MB are free", ended.output)
    assert "Traceback" not in ended.output
    assert checkpoint.latest(loaded, verify=True).step == 2
    assert [path.name for path in kinds.checkpoint_folder(loaded).glob(".step-*")] in ([], [".step-00000004.lock"])

    small_disk(loaded.path("checkpoints"), 10 * size)
    run_program("train.py", config, "--resume", ranks=2)
    assert losses_of(config) == losses_of(tiny)


@pytest.mark.skipif(why_no_nodes() is not None, reason=f"{why_no_nodes()}")
def test_a_node_without_shared_memory_is_reported_before_training(copy_of_tiny, tmp_path, small_disk):
    config = copy_of_tiny(*BEFORE_TRAINING)
    memory = tmp_path / "shm"
    small_disk(memory, 2**16)
    arguments = ["--config", str(config)]
    ranks = fork_ranks(run_launcher_on_node, "train.py", arguments, [("node1", memory)], ranks=1)
    ended = finish(ranks, 120, check=False)
    assert ended.exit_code == 2, ended.output  # not -7, a bus error
    assert (
        "error: node1: /dev/shm, where the loader keeps batches, is full or too small: 0.1 of 0.1 MiB are free"
        in ended.output
    )
    assert "set workdir" not in ended.output
    assert "Traceback" not in ended.output


def test_full_shared_memory_is_not_mistaken_for_a_full_disk(tmp_path, small_disk, monkeypatch, capsys):
    memory = tmp_path / "shm"
    small_disk(memory, 2**23)
    monkeypatch.setattr(shared_memory, "FOLDER", memory)

    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as for a semaphore, which has no file name

    assert run(fail) == 2
    assert "set workdir to another disk" in capsys.readouterr().err
    (memory / "left").write_bytes(bytes(2**22 + 1))
    assert run(fail) == 2
    printed = capsys.readouterr().err
    assert f"{memory}, where the loader keeps batches, is full or too small: 4.0 of 8.0 MiB" in printed
    assert "set workdir" not in printed


def test_plenty_of_free_shared_memory_is_not_called_a_shortage(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    for free, message in (
        (2**34, "a file that the process was reading became shorter"),
        (2**29, "is full or too small"),
    ):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free, total=2**35))
        found = shared_memory.describe_shortage(is_known=True)
        assert message in found
        assert ("too small" in found) == (free < 2**30)
        assert shared_memory.describe_shortage() is None


def test_a_tensor_that_does_not_fit_on_the_disk_is_reported_as_a_full_disk(tmp_path, small_disk):
    folder = tmp_path / "small"
    small_disk(folder, 2**21)
    large = torch.zeros(2**20)  # 4 MiB
    # safetensors removes its incomplete file, so the disk has room again
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as full, report_full_disk(folder):
        save_file({"x": large}, folder / "x.safetensors")
    assert full.value.errno == errno.ENOSPC
    assert shutil.disk_usage(folder).free == 2**21
    with pytest.raises(SafetensorError), report_full_disk(folder):
        save_file({"x": large}, folder / "no" / "x.safetensors")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), report_full_disk(folder):
        torch.save(large, folder / "x.pt")
    with pytest.raises(RuntimeError, match="another"), report_full_disk(tmp_path):
        raise RuntimeError("another")
    assert [path.name for path in folder.iterdir()] == ["x.pt"]


def test_a_full_disk_is_reported_with_the_file_that_does_not_fit(tmp_path, small_disk):
    small_disk(tmp_path / "small", 2**21)

    def fill(content):
        with build_artifact(tmp_path / "small" / "made", Recipe("lexicon", {}, {})) as building:
            (building.folder / "x").write_bytes(content)  # the error of a full disk has no file name here
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as full:
        fill(bytes(2**22))
    assert full.value.filename == str(tmp_path / "small" / ".made.partial")
    with pytest.raises(OSError, match="No space left") as other:
        fill(b"")  # stands for something else that is full, such as shared memory
    assert other.value.filename is None


def test_an_exhausted_quota_is_reported_as_a_full_disk(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", refuse)  # as the system does for a user over the quota
    with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)), report_full_disk(tmp_path):
        raise RuntimeError("what torch says")
    with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)), report_full_disk(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: so it is (os error {errno.EDQUOT})")


def test_a_shard_missing_at_the_remote_is_reported_and_the_run_resumes_when_it_is_back(tiny, copy_of_tiny, tmp_path):
    """A changed shard: test_shard_remote.py::test_a_shard_that_was_changed_in_the_remote_copy_is_not_read."""
    remote = tmp_path / "remote"
    shutil.copytree(load_config(tiny).path("shards"), remote)
    settings = {**TINY["train"], "shard_remote": str(remote), "collective_timeout_s": 15}
    config = copy_of_tiny(*BEFORE_TRAINING, train=settings)
    kept = {shard: shard.read_bytes() for shard in (remote / "train").glob("*.mds*")}
    for shard in kept:
        shard.unlink()
    ranks = start_ranks("train.py", config, ranks=2)
    first = _first_to_end(ranks)
    assert first.wait(0) == 2, first.output
    for rank in ranks:
        if rank.is_running():
            os.kill(rank.pid, signal.SIGTERM)  # as launchers do; it waits for it, in order not to print the same error
    ended = finish(ranks, check=False)
    assert f"{remote}/train: a shard of the training data cannot be read (" in ended.output
    assert "Traceback" not in ended.output
    for shard, content in kept.items():
        shard.write_bytes(content)
    again = copy_of_tiny(run="again", train=settings)
    ranks = start_ranks("train.py", again, "--resume", ranks=2)
    try:
        _pause(ranks)
    finally:
        finish(ranks, 120)
    assert losses_of(again) == losses_of(tiny)


def _first_to_end(ranks):
    deadline = time.monotonic() + 120
    while all(rank.is_running() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    return next(rank for rank in ranks if not rank.is_running())


def _pause(ranks):
    """Stops one rank for a while when training begins: the other must wait for it."""
    deadline = time.monotonic() + 120
    while "steps of" not in ranks[0].output and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(ranks[1].pid, signal.SIGSTOP)
    time.sleep(2)
    assert all(rank.is_running() for rank in ranks)
    os.killpg(ranks[1].pid, signal.SIGCONT)
