"""All sense embeddings on the device (`train.sense_bank: device`): batches then bring row numbers only."""

from pathlib import Path

import numpy as np
import torch

from dskd.errors import UserError
from dskd.models.weights import open_safetensors
from dskd.senses.dictionary import map_vectors

_PIECE_BYTES = 2**26


def load_bank(path: Path, device: torch.device) -> torch.Tensor:
    """`vectors` [R, D] bf16 of a sense dictionary on `device`.

    On the CPU it is a memory map; elsewhere the file is read in pieces, so that host memory holds one of them.

    Raises:
        UserError: when the device has no room for it.
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
    """Memory of a CUDA device that nobody has, and what torch holds there and has not given out."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require_room(path: Path, needed: int, free: int) -> None:
    """Refuses a bank that is larger than the free memory of its device.

    Raises:
        UserError: naming both sizes, in bytes here and GB (2^30 bytes) there.
    """
    if needed > free:
        raise UserError(
            f"train.sense_bank: device: the vectors of {path} have {needed / 2**30:.1f} GB, and the device has "
            f"{free / 2**30:.1f} GB free; set sense_bank: host"
        )
