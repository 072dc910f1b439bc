"""Reading and writing the safetensors files of a model's folder."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.manifest import write_json
from dskd.console import progress, say
from dskd.errors import UserError
from dskd.models.files.model_config import block_fp8

# Finds the layer number in a parameter's name; all decoders of transformers use one of these forms.
LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_SCALE = "_scale_inv"  # what block FP8 appends to the name of a matrix
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_BYTES = 4 * 2**30


def renumber_layer(name: str, number: int) -> str:
    """Returns the name of the same parameter in layer `number`."""
    return LAYER_NAME.sub(lambda layer: layer.group().replace(f".{layer.group(1)}.", f".{number}."), name, count=1)


class TensorReader:
    """A reader of the tensors in a folder's safetensors files, by name and one at a time, through memory maps.

    Matrices in block FP8 are returned as codes times scales, in the type that config.json names for the model (bfloat16
    if it names none). The scales do not count as tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = tensor_files(folder)
        self._open: dict[str, Any] = {}
        values = _json_or_empty(folder / "config.json")
        self._block = block_fp8(values)
        stored_type = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
        self._type = getattr(torch, str(stored_type).removeprefix("torch."), torch.bfloat16)

    @property
    def names(self) -> list[str]:
        """Returns the names of all tensors, in the order of their files."""
        return [name for name in self._file_of if not self._is_scale(name)]

    @property
    def numel(self) -> int:
        """Returns the number of elements of all tensors, without reading them."""
        return sum(math.prod(self.shape(name)) for name in self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of and not self._is_scale(name)

    def read(self, name: str) -> torch.Tensor:
        """Reads one whole tensor.

        Raises:
            UserError: when its file is damaged, or it is in FP8 and its scales do not fit.
        """
        tensor = self._look_up(name, "get_tensor")
        if self._block is None or name + _SCALE not in self._file_of:
            return tensor
        scales = self._look_up(name + _SCALE, "get_tensor").float()
        rows, columns = self._block
        blocks = tuple(-(-size // by) for size, by in zip(tensor.shape, self._block, strict=False))
        if tensor.ndim != 2 or tuple(scales.shape) != blocks:
            raise UserError(
                f"{self._folder}: {name}{_SCALE} has shape {list(scales.shape)}; {name}, of shape "
                f"{list(tensor.shape)}, needs one of {list(blocks)} for blocks of {rows} × {columns}"
            )
        # Repeat each scale over its block; blocks at the edges of the matrix may be smaller.
        scales = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return (tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]).to(self._type)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading the tensor.

        Raises:
            UserError: when its file is damaged.
        """
        return tuple(self._look_up(name, "get_slice").get_shape())

    def stored_type(self, name: str) -> str:
        """Returns safetensors' name for the type of a stored tensor, such as BF16 or I8; F32 for one in block FP8.

        Raises:
            UserError: when its file is damaged.
        """
        if self._block is not None and name + _SCALE in self._file_of:
            return "F32"
        return str(self._look_up(name, "get_slice").get_dtype())

    def _is_scale(self, name: str) -> bool:
        return self._block is not None and name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._file_of

    def _look_up(self, name: str, method: str) -> Any:
        """Returns what `get_tensor` or `get_slice` of the tensor's file returns."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = open_safetensors(self._folder / file)
        try:
            return getattr(self._open[file], method)(name)
        except SafetensorError as error:
            raise UserError(
                f"{self._folder / file}: {name}, which {WEIGHTS_INDEX} says is in it, cannot be read ({error}); fetch "
                "both files again"
            ) from None


def open_safetensors(path: Path) -> Any:
    """Opens a safetensors file as a memory map.

    Raises:
        UserError: when it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); was its download or copy truncated?"
        ) from None


def _json_or_empty(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # read_model_config refuses such a file, with the reason
        return {}


def tensor_files(folder: Path) -> dict[str, str]:
    """Returns {name of a tensor: its file}.

    If the folder has both a single file and an index of several, the single file is used, as transformers does.

    Raises:
        UserError: when the single file or the index cannot be read.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS_FILE).is_file():
        if index.is_file():
            _say_once(
                f"  {folder}: {WEIGHTS_FILE} is read, as transformers does; {WEIGHTS_INDEX} and its files are not"
            )
        return dict.fromkeys(open_safetensors(folder / WEIGHTS_FILE).keys(), WEIGHTS_FILE)
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from None


@functools.cache
def _say_once(message: str) -> None:
    say(message)


def write_weights(
    target: Path, reader: TensorReader, new_names: dict[str, str], replaced: dict[str, torch.Tensor] | None = None
) -> int:
    """Copies tensors into safetensors files of a few gigabytes, with an index when there are several.

    Args:
        target: the folder to write into.
        reader: the tensors to copy.
        new_names: {name in `reader`: name in `target`}.
        replaced: {new name: tensor to write instead of the stored one}.

    Returns:
        The size of the weights in bytes.
    """
    replaced = replaced or {}
    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            with report_full_disk(target):
                save_file(pending, target / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(pending))
            pending.clear()
            pending_bytes = 0

    # Names of files contain their number, which is unknown until all are written, so write parts and rename them.
    for old, new in progress(new_names.items(), total=len(new_names), label="copying", unit="tensors"):
        tensor = replaced[new] if new in replaced else reader.read(old)
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > _FILE_BYTES:
            flush()
        pending[new] = tensor.contiguous()
        pending_bytes += size
        total += size
    flush()
    if len(files) == 1:
        (target / "part-0").rename(target / WEIGHTS_FILE)
        return total
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (target / f"part-{number}").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(target / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total
