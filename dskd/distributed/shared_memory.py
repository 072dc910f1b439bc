"""The shared memory of a node, through which the loader's workers pass batches."""

import shutil
import socket
from pathlib import Path

FOLDER = Path("/dev/shm")
_LEAST_BYTES = 4 * 2**20  # the smallest runs of the tests need a quarter of that


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
    return (
        f"{socket.gethostname()}: {FOLDER}, where the loader keeps batches, is full or too small: "
        f"{usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB are free. Remove what killed jobs left there "
        f"(`ls -l {FOLDER}`), give the container more (docker: --shm-size=8g; Kubernetes: an emptyDir of "
        "medium Memory), or lower train.num_workers"
    )
