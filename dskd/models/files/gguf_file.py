"""Reading what a GGUF file says about its model: its keys, and the names, shapes, types and places of its tensors.

GGUF is the format of llama.cpp: one file with the keys (of the architecture, the tokenizer and where the model comes
from), a table of tensors, and then the tensors, most of them quantised. Only the beginning of the file is read here, so
that a wrong file is refused at once; the package `gguf` reads the tensors later (:mod:`dskd.models.gguf.teacher`).
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dskd.artifacts.pointers import refuse_pointer_beginning
from dskd.errors import UserError, shortened
from dskd.models.files import smollm2

_MAGIC = b"GGUF"
_VERSIONS = 2, 3
_ALIGNMENT = 32  # of the tensors, in bytes, if the key general.alignment does not say otherwise
# The number of a type of a key's value -> its format for the module struct. Strings and arrays have no fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME = 2**16  # bytes; anything longer cannot be a name
_MOST_DIMENSIONS = 8
_DEEPEST = 4  # lists in lists; models have none
_Kind = TypeVar("_Kind", str, bool, int, float)
# What a value is called in messages, and the Python types that it may have.
_KINDS: Mapping[type, tuple[str, tuple[type, ...]]] = {
    str: ("a text", (str,)),
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (float, int)),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # in the order of torch: the last dimension is contiguous
    type_name: str  # such as F32 or Q4_K
    offset: int  # of its first byte in the file
    size_bytes: int

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: its keys and its table of tensors."""

    path: Path
    values: Mapping[str, Any]  # its keys
    tensors: tuple[GgufTensor, ...]

    def value(self, key: str, kind: type[_Kind]) -> _Kind | None:
        """Returns the value of a key; None if the file has no such key.

        Raises:
            UserError: if the value is of another kind.
        """
        value = self.values.get(key)
        if value is not None and type(value) not in _KINDS[kind][1]:
            raise self._wrong(key, _KINDS[kind][0], value)
        return value

    def list_of(self, key: str, kind: type[_Kind]) -> list[_Kind] | None:
        """Returns the list of values of a key; None if the file has no such key.

        Raises:
            UserError: if it is not a list, or has values of another kind.
        """
        entries = self.values.get(key)
        expected = f"a list in which each value is {_KINDS[kind][0]}"
        if entries is not None and not isinstance(entries, list):
            raise self._wrong(key, expected, entries)
        others = [entry for entry in entries or () if type(entry) not in _KINDS[kind][1]]
        if others:
            raise self._wrong(key, expected, others[0], "has ")
        return entries

    def _wrong(self, key: str, expected: str, value: Any, verb: str = "is ") -> UserError:
        return UserError(
            f"teacher.path: {self.path}: the key {key} {verb}{repr(value)[:60]}, and must be {expected}; the file is "
            "damaged, or its converter has an error: download or convert it again"
        )

    @property
    def architecture(self) -> str:
        """The name of the architecture, as llama.cpp calls it; empty if the file does not say it."""
        return self.value("general.architecture", str) or ""

    @property
    def numel(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors)

    def count_types(self) -> dict[str, int]:
        """Returns the number of tensors of each type."""
        return dict(sorted(Counter(tensor.type_name for tensor in self.tensors).items()))


def require_gguf_file(path: Path) -> None:
    """Checks that there is a file at the path of a GGUF file.

    Raises:
        UserError: if there is none.
    """
    if not path.is_file():
        what = "this is a folder; name the file in it" if path.is_dir() else "there is no such file"
        raise UserError(f"teacher.path: {path}: {what}")


def read_gguf(path: Path) -> GgufFile:
    """Reads the beginning of a GGUF file.

    Raises:
        UserError: if it is missing, no GGUF file, of another version, one of several parts of a model, or cut short.
    """
    require_gguf_file(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            version = _read_version(stream, path)
            try:
                values, table, end = _read_tables(stream, size)
            except _CutShortError as error:
                cause = (
                    f" or damaged: {error} in a file of {size:,} bytes"
                    if str(error)
                    else f": it ends after {size:,} bytes, within the list of its keys and tensors"
                )
                raise UserError(f"teacher.path: {path}: the file is cut short{cause}; {_download(path)}") from None
            except ValueError as error:
                raise UserError(
                    f"teacher.path: {path}: the list of keys and tensors of this GGUF file (version {version}) is "
                    f"damaged ({error}); {_download(path)}"
                ) from None
    except OSError as error:
        raise UserError(f"teacher.path: {path}: it cannot be read ({error.strerror})") from None
    file = GgufFile(path, values, ())
    if (parts := file.value("split.count", int) or 1) > 1:
        raise UserError(
            f"teacher.path: {path}: this is part {(file.value('split.no', int) or 0) + 1} of a model in {parts} files "
            "(split.count), and transformers reads a GGUF model from one file; join them with llama.cpp's "
            "`llama-gguf-split --merge FIRST-PART NEW-FILE`"
        )
    if not table:
        raise UserError(f"teacher.path: {path}: this GGUF file has no tensors, only keys; name the file of the model")
    tensors = _place_tensors(table, end, file)
    last = max(tensors, key=lambda tensor: tensor.offset + tensor.size_bytes)
    if (needed := last.offset + last.size_bytes) > size:
        missing = [tensor.name for tensor in tensors if tensor.offset + tensor.size_bytes > size]
        raise UserError(
            f"teacher.path: {path}: the file is cut short: it has {size:,} bytes, and its {len(tensors)} tensors need "
            f"{needed:,}; incomplete or missing: {shortened(missing, 3)} ({len(missing)} in all); {_download(path)}"
        )
    return replace(file, tensors=tensors)


class _CutShortError(Exception):
    """The error of a file that ends within a value; its text, if any, is a value that is larger than the file."""


def _download(path: Path) -> str:
    """Returns what to do about a file that is not whole."""
    return f"fetch it again: `dskd smollm2 --to {path}`" if path.name == smollm2.NAME else "download it again"


def _read_version(stream: BinaryIO, path: Path) -> int:
    beginning = stream.read(64)
    if not beginning:
        raise UserError(f"teacher.path: {path}: the file is empty; {_download(path)}")
    refuse_pointer_beginning(beginning, f"teacher.path: {path}")
    if beginning[:4] == _MAGIC and len(beginning) < 8:
        raise UserError(
            f"teacher.path: {path}: the file is cut short: it has only {len(beginning)} bytes; {_download(path)}"
        )
    if beginning[:4] != _MAGIC:
        raise UserError(
            f"teacher.path: {path}: this is not a GGUF file: it begins with {beginning[:4]!r}, not with {_MAGIC!r}; "
            "was it downloaded whole, and is it what its name says?"
        )
    (version,) = struct.unpack("<I", beginning[4:8])
    if version not in _VERSIONS:
        big_endian = " (or its numbers are big-endian)" if version > 2**16 else ""
        raise UserError(
            f"teacher.path: {path}: this GGUF file has format version {version}{big_endian}; versions 2 and 3 can be "
            "read. Convert the model again with a current llama.cpp"
        )
    stream.seek(8)
    return int(version)


_Table = list[tuple[str, tuple[int, ...], int, int]]  # name, shape, number of the type, offset in the data


def _read_tables(stream: BinaryIO, size: int) -> tuple[dict[str, Any], _Table, int]:
    """Returns the keys, the table of tensors, and the offset of its end."""
    num_tensors, num_keys = _unpack(stream, "QQ")
    values: dict[str, Any] = {}
    for _ in range(num_keys):
        key = _read_string(stream, _LONGEST_NAME)
        (kind,) = _unpack(stream, "I")
        try:
            values[key] = _read_value(stream, kind, size)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        except _CutShortError as error:
            raise _CutShortError(f"{key}: {error}" if str(error) else "") from None
    table: _Table = []
    for _ in range(num_tensors):
        name = _read_string(stream, _LONGEST_NAME)
        (dimensions,) = _unpack(stream, "I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = _unpack(stream, f"{dimensions}Q")
        type_number, offset = _unpack(stream, "IQ")
        table.append((name, tuple(reversed(shape)), type_number, offset))
    return values, table, stream.tell()


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    layout = struct.Struct(f"<{form}")
    content = stream.read(layout.size)
    if len(content) < layout.size:
        raise _CutShortError
    return layout.unpack(content)


def _read_string(stream: BinaryIO, longest: int, error: type[Exception] = ValueError) -> str:
    (length,) = _unpack(stream, "Q")
    if length > longest:
        raise error(f"a text of {length:,} bytes")
    content = stream.read(length)
    if len(content) < length:
        raise _CutShortError
    return content.decode("utf-8")


def _read_value(stream: BinaryIO, kind: int, size: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _read_string(stream, size, _CutShortError)
    if kind in _SCALARS:
        return _unpack(stream, _SCALARS[kind])[0]
    if kind != _ARRAY:
        raise ValueError(f"a value of type {kind}, which GGUF does not have")
    if depth == _DEEPEST:
        raise ValueError(f"lists in lists, more than {_DEEPEST} deep")
    inner, count = _unpack(stream, "IQ")
    if count > size:
        raise _CutShortError(f"a list of {count:,} values")
    if inner in _SCALARS:
        return list(_unpack(stream, f"{count}{_SCALARS[inner]}"))
    return [_read_value(stream, inner, size, depth + 1) for _ in range(count)]


def _place_tensors(table: _Table, end: int, file: GgufFile) -> tuple[GgufTensor, ...]:
    """Returns the tensors with their sizes and their places in the file.

    Raises:
        UserError: naming types that the package `gguf` does not know, or cannot turn into numbers.
    """
    alignment = file.value("general.alignment", int)
    alignment = _ALIGNMENT if alignment is None else alignment
    if alignment < 1:
        raise UserError(
            f"teacher.path: {file.path}: the key general.alignment is {alignment}, and must be 1 or more; the file is "
            "damaged: download or convert it again"
        )
    begin = -(-end // alignment) * alignment
    types = {number: _type_of(number) for number in {number for _, _, number, _ in table}}
    if unreadable := [reason for _, _, _, reason in types.values() if reason]:
        raise UserError(
            f"teacher.path: {file.path}: the installed gguf cannot turn some tensors into numbers: "
            f"{'; '.join(sorted(unreadable))}. Take a file of this model in another quantisation, such as Q8_0 or F16, "
            "or a newer gguf"
        )
    tensors = []
    for name, shape, number, offset in table:
        type_name, block, block_bytes, _ = types[number]
        tensors.append(GgufTensor(name, shape, type_name, begin + offset, -(-prod(shape) // block) * block_bytes))
    return tuple(tensors)


def _type_of(number: int) -> tuple[str, int, int, str]:
    """Returns a type's name, the elements and bytes of a block, and why it cannot be turned into numbers, if so."""
    import gguf
    import numpy as np

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        return "", 1, 1, f"it does not know type {number}"
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:  # which gguf raises for a type that it can only name
        return kind.name, block, block_bytes, f"it cannot dequantise {kind.name}"
    return kind.name, block, block_bytes, ""
