import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rank_processes import ONE_RANK
from repository import REPOSITORY

from dskd.artifacts import kinds
from dskd.artifacts.lock import hold_lock, release_lock
from dskd.config import Config
from dskd.errors import OutageError, UserError
from dskd.plan.preflight import preflight

HOLDER = "import sys; from pathlib import Path; from dskd.artifacts.lock import hold_lock; " + (
    "hold_lock(Path(sys.argv[1]), 'works'); print('held', flush=True); sys.stdin.read()"
)


def test_a_lock_is_held_by_one_process_and_released_however_it_ends(tmp_path):
    path = tmp_path / "folder" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another process \(pid {holder.pid} on .*\) trains run 'a'") as refused:
        hold_lock(path, "trains run 'a'")
    assert refused.value.exit_code == 2
    with pytest.raises(OutageError) as waited:  # a retry may find it free
        hold_lock(path, "trains run 'a'", wait_s=0.1)
    assert waited.value.exit_code == 1
    threading.Timer(1.0, holder.kill).start()
    hold_lock(path, "trains run 'a'", wait_s=30)
    holder.wait(10)
    hold_lock(path, "trains run 'a'")
    release_lock(path)


def test_a_lock_file_of_another_user_is_reported_with_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.touch()
    may_open = Path.open

    def refuse(self, *arguments, **options):
        if self == path:  # tests may run as root, who may open everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return may_open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        UserError, match=rf"{path}: Permission denied; it belongs to user {os.getuid()}.* remove this file"
    ):
        hold_lock(path, "works")


def test_runs_of_two_work_directories_that_share_a_folder_by_links_share_a_lock(tmp_path):
    first, second, third = (Config(workdir=str(tmp_path / name), teacher={"path": "t"}) for name in "abc")
    own = first.path("checkpoints", "kd")
    own.mkdir(parents=True)
    assert kinds.run_lock_path(first, "kd") == own.with_name(".kd.lock")
    for config, run in ((second, "kd"), (third, "other")):
        config.path("checkpoints").mkdir(parents=True)
        config.path("checkpoints", run).symlink_to(own)
        assert kinds.run_lock_path(config, run) == kinds.run_lock_path(first, "kd")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_reported_with_what_to_do(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)  # NFS without lockd, Lustre without -o flock
    with pytest.raises(UserError, match=rf"lock: .* no locks \({os.strerror(number)}\).*-o flock") as refused:
        hold_lock(tmp_path / "lock", "works", wait_s=30)
    assert refused.value.exit_code == 2
    config = Config(workdir=str(tmp_path), teacher={"path": "t"})
    with pytest.raises(UserError, match=r"preflight: (.|\n)*rank 0 .*: .*no locks"):
        preflight(config, ONE_RANK)
