"""Checkpoints for another number of ranks: DeepSpeed's own files, converted to its universal form.

A ZeRO-3 checkpoint holds one share of every trained parameter and its moments for each rank that wrote it. The
universal form holds them complete, one folder per parameter, and any number of ranks can read its shares from there. It
is written only when needed, next to the checkpoint under a hidden name, and removed after every rank has read it.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dskd.artifacts.disk_space import report_full_disk, require_disk_space
from dskd.artifacts.files import replace_folder


def universal_folder(checkpoint: Path) -> Path:
    """Returns the folder of a checkpoint's universal form."""
    return checkpoint.with_name(f".{checkpoint.name}.universal")


def make_universal(checkpoint: Path) -> None:
    """Writes the universal form of a checkpoint, reading one rank's share at a time. Only one process calls it.

    Raises:
        UserError: if there is less free space than it needs.
    """
    from deepspeed.checkpoint import ds_to_universal

    target = universal_folder(checkpoint)
    partial = target.with_name(f"{target.name}.partial")
    for left in (target, partial):
        shutil.rmtree(left, ignore_errors=True)
    _require_space(checkpoint)
    options = SimpleNamespace(
        input_folder=str(checkpoint),
        output_folder=str(partial),
        num_extract_workers=1,  # 1 means this process, the only one in which the list of safe classes applies
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    printed = io.StringIO()
    try:
        with (
            no_pickles(),
            report_full_disk(checkpoint.parent),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            ds_to_universal.main(options)
    except BaseException:  # whatever the error, the incomplete folder only takes space
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (checkpoint.parent / "latest_universal").unlink(missing_ok=True)  # not needed: `load` names the folder
    replace_folder(partial, target)


def _require_space(checkpoint: Path) -> None:
    shares = sum(path.stat().st_size for path in checkpoint.glob("*_optim_states.pt"))
    needed = 2 * shares  # the pieces extracted from the shares and the merged result exist at the same time
    require_disk_space(
        checkpoint,
        needed,
        "resuming with another number of ranks",
        remedy="set workdir to another disk, or resume with as many ranks as before",
    )


@contextlib.contextmanager
def no_pickles() -> Iterator[None]:
    """Makes torch.load refuse anything but tensors and plain values, even when DeepSpeed requests more."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(_classes_in_checkpoints()):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _classes_in_checkpoints() -> list[Any]:
    """Returns the DeepSpeed classes that its files contain, and a safe replacement of `getattr`.

    Loading an instance runs no code.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address, (_zero_stage, "builtins.getattr")]


def _zero_stage(kind: Any, name: str) -> Any:
    """Returns the stage of ZeRO with this name.

    Some versions of Python, such as Debian 12's 3.11.2, pickle it as a call of `getattr`, which would return anything.

    Raises:
        ValueError: for any other attribute.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise ValueError(f"a checkpoint has no use for the attribute {name!r} of {kind}")
    return ZeroStageEnum[name]
