import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
from rank_jobs import name_segments_on_nodes
from rank_processes import ONE_RANK, finish, fork_ranks
from repository import REPOSITORY
from streaming import MDSWriter, StreamingDataset

from dskd.distributed.node_cache import open_node_cache, streaming_names
from dskd.errors import UserError

JOB = """
import sys, torch
from dskd.distributed.world import World
from dskd.distributed.node_cache import open_node_cache
print(open_node_cache(sys.argv[1], World(0, 1, 0, torch.device("cpu"))), flush=True)
sys.stdin.read()
"""


def _job(base):
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )


def test_jobs_have_their_own_folders_and_remove_only_those_of_dead_jobs(tmp_path):
    live, dead = _job(tmp_path), _job(tmp_path)
    live_folder, dead_folder = (job.stdout.readline().strip() for job in (live, dead))
    assert live_folder != dead_folder
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait(10)
    assert Path(dead_folder).is_dir()
    own = open_node_cache(str(tmp_path), ONE_RANK)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([live_folder, str(own)])
    live.communicate(timeout=10)
    assert [str(path) for path in tmp_path.iterdir()] == [str(own)]  # a job removes its folder when it ends


def test_a_read_only_cache_folder_is_refused(tmp_path, read_only):
    read_only(tmp_path)
    with pytest.raises(UserError, match=r"set train\.shard_cache"):
        open_node_cache(str(tmp_path), ONE_RANK)


def test_a_file_instead_of_a_cache_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write there"):
        open_node_cache(str(tmp_path / "file"), ONE_RANK)


@pytest.mark.slow
def test_two_jobs_on_the_same_two_nodes_do_not_deadlock(tmp_path):
    """In one job the first rank is on node1, in the other it is on node2."""
    for name in ("node1", "node2"):
        (tmp_path / name).mkdir()
    nodes = (["node1", "node2"], ["node2", "node1"])
    jobs = [fork_ranks(name_segments_on_nodes, tmp_path, hosts, len(nodes), ranks=2) for hosts in nodes]
    for ranks in jobs:
        assert finish(ranks, 40).output.count("alone on node") == 2


def test_no_number_in_use_in_shared_memory_is_chosen(tmp_path):
    """A killed job leaves some kinds of segments but not others; mosaicml-streaming would choose a number in use."""
    folder = tmp_path / "cache"
    folder.mkdir()
    samples = tmp_path / "samples"
    with MDSWriter(out=str(samples), columns={"x": "int"}) as writer:
        writer.write({"x": 7})
    names = {path.name for path in Path("/dev/shm").glob("0*_*")}
    highest = max((int(name[:6]) for name in names), default=-1) + 2
    missing = {f"{highest:06}_locals", *(f"{number:06}_barrier" for number in range(highest))} - names
    left = [SharedMemory(name, create=True, size=36) for name in missing]
    try:
        with streaming_names(folder, ONE_RANK):
            dataset = StreamingDataset(remote=str(samples), local=str(folder / "a"), batch_size=1)
        assert dataset[0] == {"x": 7}
        assert dataset._shm_prefix_int == highest + 1
    finally:
        for segment in left:
            segment.close()
            segment.unlink()
