"""The sense bank: all sense embeddings on the device (`train.sense_bank: device`), so that batches hold row numbers
only.
"""

from pathlib import Path

import numpy as np
import torch

from dskd.config import Config
from dskd.console import gigabytes
from dskd.errors import UserError
from dskd.models.files.weights import open_safetensors
from dskd.senses.dictionary import map_vectors

_PIECE_BYTES = 2**26


def bank_is_on_device(config: Config) -> bool:
    """Returns True if every rank of training holds the sense bank; otherwise batches bring the rows that they need."""
    return config.loss.reads("sense_rows") and config.train.sense_bank == "device"


def load_bank(path: Path, device: torch.device) -> torch.Tensor:
    """Loads `vectors` [R, D] bf16 of a sense dictionary onto `device`.

    On the CPU the result is a memory map. For other devices the file is read in pieces, so that host memory holds only
    one of them at a time.

    Raises:
        UserError: if the device has no room for it.
    """
    if device.type == "cpu":
        return open_safetensors(path).get_tensor("vectors")
    vectors = map_vectors(path)
    require_room(path, vectors.nbytes, free_bytes(device))
    return copy_in_pieces(vectors, torch.empty(vectors.shape, dtype=torch.bfloat16, device=device), _PIECE_BYTES)


def copy_in_pieces(vectors: np.ndarray, bank: torch.Tensor, piece_bytes: int) -> torch.Tensor:
    """Fills `bank` [R, D] bf16 with `vectors` [R, D], the raw bits of bf16, and returns it."""
    rows = max(1, piece_bytes * len(vectors) // max(1, vectors.nbytes))
    for start in range(0, len(vectors), rows):
        piece = torch.from_numpy(np.array(vectors[start : start + rows]))
        bank[start : start + rows].copy_(piece.view(torch.bfloat16))
    return bank


def free_bytes(device: torch.device) -> int:
    """Returns the free bytes of a CUDA device, including memory that torch has reserved but not allocated."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require_room(path: Path, needed: int, free: int) -> None:
    """Checks that a bank of `needed` bytes fits into the `free` bytes of its device.

    Raises:
        UserError: naming both sizes in GB (2^30 bytes), if it does not.
    """
    if needed > free:
        raise UserError(
            f"train.sense_bank: device: the vectors of {path} need {gigabytes(needed)}, but the device has "
            f"only {gigabytes(free)} free; set train.sense_bank to host"
        )
