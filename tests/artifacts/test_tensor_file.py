"""Files of tensors that are larger than memory, read back and written with safetensors itself."""

import os
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dskd.artifacts.tensor_file import create_tensors, map_tensor
from dskd.errors import UserError

SHAPES = {
    "flags": ("U8", (3,)),  # an odd number of bytes: the other tensors must still be aligned to their types
    "rows": ("BF16", (5, 2)),
    "ids": ("I32", (3,)),
    "counts": ("I64", (4,)),
    "nothing": ("I32", (0, 3)),
}


def test_safetensors_reads_what_was_written_piece_by_piece(tmp_path):
    rows = torch.randn(5, 2).bfloat16()
    with create_tensors(tmp_path / "x", SHAPES) as maps:
        maps["rows"][3:] = rows[3:].view(torch.uint16).numpy()
        maps["rows"][:3] = rows[:3].view(torch.uint16).numpy()
        maps["counts"][:] = [1, 2, 3, 2**40]
        maps["flags"][1] = 7
    found = load_file(tmp_path / "x")
    assert torch.equal(found["rows"], rows)
    assert found["counts"].tolist() == [1, 2, 3, 2**40]
    assert found["flags"].tolist() == [0, 7, 0]
    assert found["ids"].tolist() == [0, 0, 0]  # not written
    assert found["nothing"].shape == (0, 3)


def test_files_that_safetensors_wrote_are_mapped(tmp_path):
    rows = torch.randn(4, 3).bfloat16()
    save_file({"a": torch.arange(3), "rows": rows, "none": torch.empty(0, 2)}, tmp_path / "x")
    mapped = map_tensor(tmp_path / "x", "rows", "BF16")
    assert torch.equal(torch.from_numpy(np.array(mapped)).view(torch.bfloat16), rows)
    assert map_tensor(tmp_path / "x", "none", "F32").shape == (0, 2)
    with pytest.raises(UserError, match="rows is BF16, expected F32"):
        map_tensor(tmp_path / "x", "rows", "F32")


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path):
    """Uses a limit on file sizes instead of a full disk: both refuse the reservation."""
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with create_tensors(tmp_path / "x", {"rows": ("F32", (10_000,))}):
                os._exit(1)
        except OSError:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
