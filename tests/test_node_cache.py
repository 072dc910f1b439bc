import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from dskd.distributed import World
from dskd.errors import UserError
from dskd.node_cache import open_node_cache

WORLD = World(0, 1, 0, torch.device("cpu"))
JOB = """
import sys, torch
from dskd.distributed import World
from dskd.node_cache import open_node_cache
print(open_node_cache(sys.argv[1], World(0, 1, 0, torch.device("cpu"))), flush=True)
sys.stdin.read()
"""


def _job(base):
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    return process, process.stdout.readline().strip()


def test_jobs_have_folders_of_their_own_and_take_away_only_what_dead_ones_left(tmp_path):
    (live, live_folder), (dead, dead_folder) = _job(tmp_path), _job(tmp_path)
    assert live_folder != dead_folder
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait(10)
    assert Path(dead_folder).is_dir()
    mine = open_node_cache(str(tmp_path), WORLD)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([live_folder, str(mine)])
    live.communicate(timeout=10)
    assert [str(path) for path in tmp_path.iterdir()] == [str(mine)]  # a job that ends takes its folder with it


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"set train\.shard_cache"):
        open_node_cache(str(tmp_path), WORLD)


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write there"):
        open_node_cache(str(tmp_path / "file"), WORLD)
