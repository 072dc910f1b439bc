"""Checkpoints for another number of ranks: DeepSpeed's own files, made into its universal form.

A ZeRO-3 checkpoint has one share of every trained parameter, and of its moments, for each rank that wrote it. The
universal form has them whole, a folder a parameter, and any number of ranks takes its shares from there. It is made
when it is needed, beside the checkpoint under a hidden name, and is removed when the next checkpoint is written.
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

from dskd.folders import replace_folder


def universal_folder(checkpoint: Path) -> Path:
    """Where the universal form of a checkpoint is."""
    return checkpoint.with_name(f".{checkpoint.name}.universal")


def make_universal(checkpoint: Path) -> None:
    """Writes the universal form of a checkpoint. One process calls it; it reads one rank's share at a time."""
    from deepspeed.checkpoint import ds_to_universal

    target = universal_folder(checkpoint)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = SimpleNamespace(
        input_folder=str(checkpoint),
        output_folder=str(partial),
        num_extract_workers=1,  # 1 is this process: only here do the classes count that may be in the files
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    printed = io.StringIO()
    with no_pickles(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        ds_to_universal.main(options)
    (checkpoint.parent / "latest_universal").unlink()  # we always name the folder
    replace_folder(partial, target)


@contextlib.contextmanager
def no_pickles() -> Iterator[None]:
    """Makes torch.load refuse anything but tensors and plain values, also where DeepSpeed asks for more."""
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
    """The classes of DeepSpeed's that its files name beside tensors and plain values; none runs code when loaded."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
