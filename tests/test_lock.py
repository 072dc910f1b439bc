import subprocess
import sys
import threading

import pytest
from conftest import REPOSITORY

from dskd.errors import OutageError, UserError
from dskd.lock import hold_lock, release_lock

HOLDER = "import sys; from pathlib import Path; from dskd.lock import hold_lock; " + (
    "hold_lock(Path(sys.argv[1]), 'works'); print('held', flush=True); sys.stdin.read()"
)


def test_a_lock_is_held_by_one_process_and_goes_with_it_however_it_ends(tmp_path):
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
    with pytest.raises(OutageError) as waited:  # a restart may find it free
        hold_lock(path, "trains run 'a'", wait_s=0.1)
    assert waited.value.exit_code == 1
    threading.Timer(1.0, holder.kill).start()
    hold_lock(path, "trains run 'a'", wait_s=30)
    holder.wait(10)
    hold_lock(path, "trains run 'a'")
    release_lock(path)
