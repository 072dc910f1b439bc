"""Reads records from files with columns: Parquet, Arrow, folders that `datasets` saved, and MDS shards."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts import mds
from dskd.artifacts.pointers import refuse_pointer
from dskd.corpus.opening import reading_errors
from dskd.corpus.records import CHAT_KEYS, CHATS, has_instruction
from dskd.errors import UserError

_ROWS_AT_ONCE = 1000
_PARQUET_BUFFER_BYTES = 2**20
_ARROW_FILE_MAGIC = b"ARROW1"
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


# Chooses the columns to read of a file, from its path and {column: type}; raises a UserError if it lacks them.
Choice = Callable[[Path, Mapping[str, Any]], Sequence[str]]
Row = dict[str, Any]


def read_parquet(path: Path, choose: Choice) -> Iterator[tuple[int, Row]]:
    """Yields (number, {column: value}) for the rows of a Parquet file; numbers count from 1, and a null is None."""
    refuse_pointer(path)
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES) as file:
        columns = choose(path, _types_of(file.schema_arrow))
        batches = file.iter_batches(_ROWS_AT_ONCE, columns=list(columns))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def read_arrow(path: Path, choose: Choice) -> Iterator[tuple[int, Row]]:
    """Yields (number, {column: value}) for the rows of an Arrow file, in stream or file format; numbers count from 1,
    and a null is None.

    A file may hold several streams, one after the other. Raises a UserError when a stream has no end mark, or lacks the
    columns.
    """
    refuse_pointer(path)
    with pa.memory_map(str(path)) as source:
        batches = _arrow_batches(path, choose, source)
        yield from enumerate((row for batch in batches for row in _rows_of(batch)), start=1)


def _arrow_batches(path: Path, choose: Choice, source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    size, is_file = source.size(), source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    source.seek(0)
    if is_file:
        file = pa.ipc.open_file(source)
        columns = list(choose(path, _types_of(file.schema)))
        for number in range(file.num_record_batches):
            yield file.get_batch(number).select(columns)
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
        columns = list(choose(path, _types_of(reader.schema)))
        for batch in reader:
            yield batch.select(columns)


def _rows_of(batch: pa.RecordBatch) -> Iterator[Row]:
    for first in range(0, batch.num_rows, _ROWS_AT_ONCE):  # a batch may have all rows of a file
        yield from batch.slice(first, _ROWS_AT_ONCE).to_pylist()


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


def read_saved_dataset(state: Path, choose: Choice) -> Iterator[tuple[int, Row]]:
    """Yields (number, {column: value}) for the rows of a folder of `Dataset.save_to_disk` with this `state.json`.

    Numbers count from 1, over all files.
    """
    number = 0
    for path in saved_files(state):
        if not path.is_file():
            raise UserError(f"{path}: this file is missing, but {state.name} names it; copy the folder again")
        with reading_errors(path):
            for _, row in read_arrow(path, choose):
                number += 1
                yield number, row


def read_mds(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    """Yields (number, text) for the samples of an index's shards; numbers start at 0, as in mosaicml-streaming."""
    refuse_pointer(path)
    for shard in mds.read_index(path):
        columns = dict(zip(shard.get("column_names", ()), shard.get("column_encodings", ()), strict=False))
        if columns.get(text_field) != "str":
            raise UserError(_no_text_column(path, text_field, columns))
    yield from enumerate(sample[text_field] for sample in mds.read_samples(path, column=text_field))


def column_of_text(text_field: str) -> Choice:
    """Returns a choice of the column `text_field`, which must hold strings."""

    def choose(path: Path, columns: Mapping[str, Any]) -> Sequence[str]:
        if text_field not in columns or not _holds_strings(columns[text_field]):
            raise UserError(_no_text_column(path, text_field, columns))
        return [text_field]

    return choose


def _types_of(schema: pa.Schema) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in schema}


def _holds_strings(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_strings(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def describe_columns(columns: Mapping[str, Any]) -> str:
    """Returns the names and types of columns, for messages."""
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "no columns"


def _no_text_column(path: Path, text_field: str, columns: Mapping[str, Any]) -> str:
    has = describe_columns(columns)
    chats = [name for name, kind in columns.items() if _holds_chats(kind) or name in CHAT_KEYS]
    remedy = "name it with corpus.text_field"
    if chats:
        remedy = f"{chats[0]!r} holds chats: set corpus.source: chat, which reads them, as {CHATS} shows"
    elif has_instruction(columns):
        remedy = f"these are instructions and their answers: write them as chats, as {CHATS} shows"
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
