"""The check that a model to be made fits into memory and onto the disk, before it is made."""

from pathlib import Path

import psutil

from dskd.artifacts.disk_space import require_disk_space
from dskd.console import gigabytes
from dskd.errors import UserError

FLOAT32_BYTES = 4
_ROOM = 1.1  # for the tokenizer and a part of the model that is in memory twice


def require_room(numel: int, target: Path, what: str, *, key: str, remedy: str) -> None:
    """Checks that a model of `numel` values in float32 fits into memory and onto the disk.

    Args:
        numel: its number of values.
        target: the folder to write, which need not be there yet.
        what: names the values, for messages: "…, the 1,000 values of x".
        key: the config's key that asks for the model.
        remedy: what to do if the memory is too small.

    Raises:
        UserError: with both numbers, if it does not fit.
    """
    needed = round(_ROOM * FLOAT32_BYTES * numel)
    require_disk_space(target, needed, what)
    if needed > (available := psutil.virtual_memory().available):
        raise UserError(
            f"{key}: {what} need {gigabytes(needed)} of memory, and {gigabytes(available)} are available; {remedy}"
        )
