"""Reads texts from files with columns: Parquet, Arrow, folders that `datasets` saved, and MDS shards."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts import mds
from dskd.artifacts.pointers import refuse_pointer
from dskd.corpus.opening import reading_errors
from dskd.corpus.records import CHAT_KEYS, CHATS, has_instruction
from dskd.errors import UserError

_PARQUET_ROWS = 1000
_PARQUET_BUFFER_BYTES = 2**20
_ARROW_FILE_MAGIC = b"ARROW1"
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path, text_field: str) -> Iterator[tuple[int, str | None]]:
    """Yields (row, text) for the column `text_field` of a Parquet file; rows count from 1, and a null is None."""
    refuse_pointer(path)
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES) as file:
        _require_text_column(path, text_field, file.schema_arrow)
        batches = file.iter_batches(_PARQUET_ROWS, columns=[text_field])
        yield from enumerate((text.as_py() for batch in batches for text in batch.column(0)), start=1)


def read_arrow(path: Path, text_field: str) -> Iterator[tuple[int, str | None]]:
    """Yields (row, text) for an Arrow file, in stream or file format; rows count from 1, and a null is None.

    A file may hold several streams, one after the other. Raises a UserError when a stream has no end mark, or there is
    no column of texts.
    """
    refuse_pointer(path)
    with pa.memory_map(str(path)) as source:
        batches = _arrow_batches(path, text_field, source)
        yield from enumerate((text.as_py() for batch in batches for text in batch.column(text_field)), start=1)


def _arrow_batches(path: Path, text_field: str, source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    size, is_file = source.size(), source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    source.seek(0)
    if is_file:
        file = pa.ipc.open_file(source)
        _require_text_column(path, text_field, file.schema)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
        return
    # Arrow reads a stream that was cut between two batches without an error, so refuse all streams without an end mark.
    source.seek(max(0, size - len(_ARROW_STREAM_END)))
    if source.read(len(_ARROW_STREAM_END)) != _ARROW_STREAM_END:
        raise UserError(
            f"{path}: this Arrow stream has no end mark: its download or copy was truncated, or its writer was never "
            "closed; fetch it again, or write it again and close the writer"
        )
    source.seek(0)
    while source.tell() < size:  # a reader stops at the end of its stream, where another may begin
        reader = pa.ipc.open_stream(source)
        _require_text_column(path, text_field, reader.schema)
        yield from reader


def saved_files(state: Path) -> list[Path]:
    """Returns the Arrow files that the `state.json` of a folder saved by `datasets` names, in its order.

    Raises:
        UserError: when `state` was not written by `Dataset.save_to_disk`, names files outside its folder, or has a
            selection of rows.
    """
    refuse_pointer(state)
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in content["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state}: this is not the state of a dataset that `datasets` saved ({error!r})") from None
    if content.get("_indices_data_files"):
        raise UserError(
            f"{state}: the dataset was saved with a selection of its rows apart from them; save it again with "
            "flatten_indices().save_to_disk(FOLDER)"
        )
    for name in names:
        if not (state.parent / name).resolve().is_relative_to(state.parent.resolve()):
            raise UserError(f"{state}: it names {name}, which is outside of its folder; save the dataset again")
    return [state.parent / name for name in names]


def read_saved_dataset(state: Path, text_field: str) -> Iterator[tuple[int, str | None]]:
    """Yields (row, text) for the folder of `Dataset.save_to_disk` with this `state.json`.

    Rows count from 1, over all files.
    """
    number = 0
    for path in saved_files(state):
        if not path.is_file():
            raise UserError(f"{path}: this file is missing, but {state.name} names it; copy the folder again")
        with reading_errors(path):
            for _, text in read_arrow(path, text_field):
                number += 1
                yield number, text


def read_mds(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    """Yields (number, text) for the samples of an index's shards; numbers start at 0, as in mosaicml-streaming."""
    refuse_pointer(path)
    for shard in mds.read_index(path):
        columns = dict(zip(shard.get("column_names", ()), shard.get("column_encodings", ()), strict=False))
        if columns.get(text_field) != "str":
            raise UserError(_no_text_column(path, text_field, columns))
    yield from enumerate(sample[text_field] for sample in mds.read_samples(path, column=text_field))


def _require_text_column(path: Path, text_field: str, schema: pa.Schema) -> None:
    columns = {field.name: field.type for field in schema}
    if text_field not in columns or not _holds_strings(columns[text_field]):
        raise UserError(_no_text_column(path, text_field, columns))


def _holds_strings(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_strings(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _no_text_column(path: Path, text_field: str, columns: Mapping[str, Any]) -> str:
    has = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "no columns"
    chats = [name for name, kind in columns.items() if _holds_chats(kind) or name in CHAT_KEYS]
    remedy = "name it with corpus.text_field"
    if chats:
        remedy = (
            f"{chats[0]!r} holds chats, which are not read as they are: write each as a text with the teacher's chat "
            f"template, as {CHATS} shows"
        )
    elif has_instruction(columns):
        remedy = f"these are instructions and their answers: write both as one text, as {CHATS} shows"
    elif isinstance(columns.get(text_field), pa.DataType) and pa.types.is_binary(columns[text_field]):
        remedy = "cast it to strings, or name another one with corpus.text_field"
    return f"{path}: expected a column {text_field!r} of strings, but it has {has}; {remedy}"


def _holds_chats(kind: Any) -> bool:
    if not isinstance(kind, pa.DataType) or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    if not pa.types.is_struct(kind.value_type):
        return False
    names = {field.name for field in kind.value_type}
    return {"role", "content"} <= names or {"from", "value"} <= names
