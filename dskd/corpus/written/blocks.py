"""The blocks in which texts are written: an interruption loses those that are not complete.

A block has the texts of consecutive requests. Its size depends only on the number of requests, so any number of ranks
writes the same blocks.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts.files import write_text
from dskd.config.data import LARGEST_BATCH
from dskd.corpus.written.requests import Request

FILE = "texts.parquet"
_WRITER = ".writer"
_SCHEMA = pa.schema(
    [
        ("word", pa.string()),
        ("synset", pa.string()),
        ("part_of_speech", pa.string()),
        ("number", pa.int32()),
        ("text", pa.string()),
    ]
)
_MIN_BLOCKS, _SMALLEST = 16, 32  # few requests are cut so that several ranks have work, and batches are still large


def blocks_of(count: int) -> list[range]:
    """Splits `count` requests into ranges of equal size, except for the last."""
    size = min(LARGEST_BATCH, max(_SMALLEST, -(-count // _MIN_BLOCKS)))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def is_written(folder: Path, block: range) -> bool:
    """Returns True if a block of the artifact under construction in `folder` is complete."""
    return _file(folder, block).is_file()


def write_block(folder: Path, block: range, texts: Sequence[str]) -> None:
    """Writes the texts of a block, all at once."""
    file = _file(folder, block)
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(list(texts), ensure_ascii=False))


def join_blocks(folder: Path, blocks: Sequence[range], requests: Sequence[Request]) -> list[str]:
    """Writes the texts of all blocks into one table, and returns them in the order of the requests."""
    texts: list[str] = [text for block in blocks for text in json.loads(_file(folder, block).read_text("utf-8"))]
    columns = {
        "word": [request.sense.word for request in requests],
        "synset": [request.sense.synset for request in requests],
        "part_of_speech": [request.sense.part_of_speech for request in requests],
        "number": [request.number for request in requests],
        "text": texts,
    }
    pq.write_table(pa.table(columns, schema=_SCHEMA), folder / FILE, compression="zstd")
    return texts


def note_writer(folder: Path, model: str) -> None:
    """Writes the name of the server's model that writes the blocks into a file next to them."""
    write_text(folder / _WRITER, model)


def read_writer(folder: Path) -> str | None:
    """Returns the name that :func:`note_writer` has written; None if there is none."""
    file = folder / _WRITER
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _file(folder: Path, block: range) -> Path:
    return folder / ".blocks" / f"{block.start:012d}.json"
