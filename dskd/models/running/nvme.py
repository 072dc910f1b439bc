"""Parameters on a local disk (`teacher.offload: nvme`): the folder DeepSpeed puts them in, and its settings.

DeepSpeed reads and writes them with its operator `async_io`, which it compiles at first use and which needs the headers
of libaio. If something is missing, the user gets an error before anything is loaded.
"""

from functools import cache
from pathlib import Path
from typing import Any

from dskd.distributed.node_cache import make_own_folder
from dskd.distributed.world import World
from dskd.errors import UserError, first_line

BUFFERS = 8  # shares in memory at once: those of one module, and those that are read ahead


def open_nvme_folder(nvme_path: str) -> Path:
    """Creates a folder in `nvme_path` for one rank and one model.

    It is deleted when the process ends. If the process was killed, the next one that needs a folder there deletes it.

    Raises:
        UserError: when `nvme_path` does not exist or cannot be written to, or DeepSpeed's `async_io` cannot be used.
    """
    path = Path(nvme_path).expanduser()
    if not path.is_dir():
        raise UserError(f"teacher.nvme_path: there is no folder {path} on this node; make it, on a local disk")
    problem = _async_io_problem()
    if problem:
        raise UserError(f"teacher.offload: nvme needs DeepSpeed's async_io, but {problem}, or set teacher.offload: cpu")
    try:
        # DeepSpeed empties the folder it gets, so no two models may share one.
        return make_own_folder(path)
    except OSError as error:
        raise UserError(f"teacher.nvme_path: {path} cannot be written to ({error.strerror})") from None


def nvme_settings(
    folder: Path, largest_numel: int, world: World, *, pin_memory: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns DeepSpeed's sections `offload_param` and `aio` for a model.

    `largest_numel` is the number of elements of its largest parameter: each buffer in memory must be able to hold a
    rank's share of any parameter.
    """
    offload = {
        "device": "nvme",
        "nvme_path": str(folder),
        "buffer_count": BUFFERS,
        "buffer_size": buffer_numel(largest_numel, world.world_size),
        "pin_memory": pin_memory,
    }
    aio = {"block_size": 2**20, "queue_depth": 16, "single_submit": False, "overlap_events": True}
    return offload, aio


def buffer_numel(largest_numel: int, world_size: int) -> int:
    """Returns the number of elements of a buffer in memory, for a model whose largest parameter has `largest_numel`."""
    return -(-largest_numel // world_size) + 1024


@cache
def _async_io_problem() -> str | None:
    """Returns why `async_io` cannot be used and what to do, or None if it can. Compiles it at the first call."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return "libaio or its headers are missing; install them (libaio-dev on Debian, libaio-devel on Fedora)"
    try:
        builder.load(verbose=False)
    except Exception as error:  # a missing compiler, ninja or library each raise errors of their own
        return f"it cannot be compiled here ({first_line(error)}); it needs ninja and a C++ compiler"
    return None
