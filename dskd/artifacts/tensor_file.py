"""safetensors files that are larger than memory, written and read piece by piece through memory maps."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dskd.errors import UserError

# {safetensors' name of a type: numpy's type}; numpy lacks bf16, so it is represented by its raw bits.
_DTYPES = {"BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I64": np.int64, "U8": np.uint8}
_ALIGNMENT = 8


@contextmanager
def create_tensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[dict[str, np.ndarray]]:
    """Creates a file of tensors and yields a writable memory map of each, initially zero.

    Args:
        path: the file.
        tensors: {name: (safetensors' name of the type, shape)}. BF16 is mapped as its raw 16 bits.

    Raises:
        OSError: if the disk has too little space.
    """
    header, places, size = {}, {}, 0
    # Widest types first, so that each tensor is aligned to its type.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -np.dtype(_DTYPES[item[1][0]]).itemsize):
        stop = size + int(np.prod(shape, dtype=np.int64)) * np.dtype(_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, stop]}
        places[name], size = size, stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        _reserve(stream.fileno(), 8 + len(text) + size)
    maps: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in tensors.items():
        if 0 in shape:  # an empty file region cannot be mapped
            maps[name] = np.empty(shape, _DTYPES[dtype])
        else:
            maps[name] = np.memmap(path, _DTYPES[dtype], "r+", 8 + len(text) + places[name], shape)
    yield maps
    for tensor in maps.values():
        if isinstance(tensor, np.memmap):
            tensor.flush()


def is_whole(path: Path) -> bool:
    """Returns True if the file exists and is as large as its header says."""
    try:
        header, header_size = _read_header(path)
        size = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        return path.stat().st_size == 8 + header_size + size
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file, and its size in bytes."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)), size


def _reserve(descriptor: int, size: int) -> None:
    """Sets the file's size and reserves its space on disk: a full disk raises an error here instead of crashing the
    process on access to a mapped page.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def tensor_names(path: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file."""
    return set(_read_header(path)[0]) - {"__metadata__"}


def map_tensor(path: Path, name: str, dtype: str) -> np.ndarray:
    """Returns a tensor of a safetensors file as a read-only memory map, which reads pages on access.

    Raises:
        UserError: if the tensor has another type.
    """
    header, header_size = _read_header(path)
    entry = header[name]
    if entry["dtype"] != dtype:
        raise UserError(f"{path}: {name} is {entry['dtype']}, expected {dtype}; another program made this file")
    shape = tuple(entry["shape"])
    if 0 in shape:
        return np.empty(shape, _DTYPES[dtype])
    return np.memmap(path, _DTYPES[dtype], "r", 8 + header_size + entry["data_offsets"][0], shape)
