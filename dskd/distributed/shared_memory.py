"""The shared memory of a node, through which the loader's workers pass batches."""

import shutil
import socket
from pathlib import Path

FOLDER = Path("/dev/shm")
_LEAST_BYTES = 4 * 2**20  # the smallest runs of the tests need a quarter of that
_PLENTY_BYTES = 2**30  # more than the loader keeps there at once


def describe_shortage(*, is_known: bool = False) -> str | None:
    """Returns a message about this node's shared memory if almost none of it is free, otherwise None.

    A process that writes more to it than is free gets a bus error, which ends it without a message, or the error of a
    full disk.

    Args:
        is_known: True if it was full a moment ago; the process that filled it may have died of that.
    """
    if not FOLDER.is_dir():
        return None
    usage = shutil.disk_usage(FOLDER)
    if usage.free >= _LEAST_BYTES and not is_known:
        return None
    free = f"{usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB are free"
    what = f"{FOLDER}, where the loader keeps batches,"
    remedy = (
        f"what killed jobs left there (`ls -l {FOLDER}`), give the container more (docker: --shm-size=8g; Kubernetes: "
        "an emptyDir of medium Memory), or lower train.num_workers"
    )
    if usage.free >= _PLENTY_BYTES:
        return (
            f"{socket.gethostname()}: a process of the loader has died: {what} was full at that moment, or a file that "
            f"the process was reading became shorter. Now {free}. Run the same command again (training: with "
            f"--resume); if this error comes back, compare the shards with `dskd inspect shards`, remove {remedy}"
        )
    return f"{socket.gethostname()}: {what} is full or too small: {free}. Remove {remedy}"
