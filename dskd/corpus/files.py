"""Reads documents from the files that :mod:`dskd.corpus.finding` finds: text, JSON lines, Parquet, Arrow and MDS.

Files are read as streams, so no file is in memory as a whole, except one shard of an MDS folder at a time.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dskd.artifacts import mds
from dskd.console import say, warn
from dskd.corpus import records, tables
from dskd.corpus.finding import DATASET_STATE, JSON_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIX
from dskd.corpus.opening import open_text, reading_errors, without_compression
from dskd.errors import UserError, shortened
from dskd.lexicon.reading import is_storable


@dataclass(frozen=True)
class Document:
    """A text of the corpus."""

    name: str  # tells the user where the text is
    text: str
    split_key: str  # its hash decides the side of the split
    continuation_tokens: int | None = None  # maximum number of tokens the teacher may add; None: the config's number
    tokens: np.ndarray | None = None  # [n] int32, of a chat; the tokens of other documents are made later
    counted: np.ndarray | None = None  # [n] uint8, 1 where a chat's token counts in the loss


def read_file(path: Path, text_field: str) -> Iterator[Document]:
    """Yields the documents of one file: the paragraphs of a text, or the records of JSON, Parquet, Arrow and MDS.

    Text and JSON may be compressed. To read the samples of all shards of an MDS folder, pass its index; to read the
    rows of a folder that `datasets` saved, pass its `state.json`.

    Raises:
        UserError: when the file, or a line or row of it, cannot be read; it names them.
    """
    with reading_errors(path):
        yield from as_documents(str(path), _read_texts(path, text_field))


def read_records(
    path: Path, choose: tables.Choice, decoder: json.JSONDecoder | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields (number, record) for a file of records, which are objects in JSON and rows in Parquet and Arrow.

    `choose` names the columns to read of a file that has columns, and `decoder` decodes JSON.

    Raises:
        UserError: when the file has no records, or it, a line or a row of it cannot be read; it names them.
    """
    with reading_errors(path):
        if path.name == DATASET_STATE:
            yield from tables.read_saved_dataset(path, choose)
        elif (name := without_compression(path.name)).endswith(".parquet"):
            yield from tables.read_parquet(path, choose)
        elif name.endswith(".arrow"):
            yield from tables.read_arrow(path, choose)
        elif name.endswith(JSON_SUFFIXES) and path.name != mds.INDEX:
            yield from records.read_json(path, decoder)
        else:
            raise UserError(
                f"{path}: expected records ({', '.join((*JSON_SUFFIXES, *TABLE_SUFFIXES))} or a folder of "
                "Dataset.save_to_disk); leave it out, or write what it holds as JSON lines"
            )


def as_documents(source: str, texts: Iterable[tuple[int, str | None]]) -> Iterator[Document]:
    """Yields documents from the numbered texts of a source.

    It leaves out empty texts, nulls (and prints their number), and values that are not text (with a warning).
    """
    left_out: list[int] = []
    nulls = 0
    for number, text in texts:
        if text is None:
            nulls += 1
            continue
        if not is_storable(text):
            left_out.append(number)
            continue
        stripped = text.strip()
        if stripped:
            yield Document(f"{source}:{number}", stripped, stripped)
    if nulls:
        say(f"  {source}: {nulls:,} records without a text (null) are left out")
    if left_out:
        warn(
            f"{source}: {len(left_out):,} documents are not text (a NUL or half a surrogate pair) and are left out: "
            f"{shortened(left_out)}"
        )


def _read_texts(path: Path, text_field: str) -> Iterator[tuple[int, str | None]]:
    if path.name == mds.INDEX:
        yield from tables.read_mds(path, text_field)
    elif without_compression(path.name).endswith(TEXT_SUFFIX):
        yield from _read_paragraphs(path)
    else:
        for number, record in read_records(path, tables.column_of_text(text_field)):
            yield number, records.text_of(record, text_field, f"{path}:{number}")


def _read_paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    start = 1
    lines: list[str] = []
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                if not lines:
                    start = number
                lines.append(line)
            elif lines:
                yield start, "".join(lines)
                lines = []
    if lines:
        yield start, "".join(lines)
