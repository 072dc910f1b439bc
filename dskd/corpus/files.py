"""Documents in files: text, JSON lines, Parquet, Arrow and MDS, as :mod:`dskd.corpus.finding` finds them.

Everything is read as a stream: no file is in memory whole, except one shard of an MDS folder at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dskd.artifacts import mds
from dskd.console import say, warn
from dskd.corpus import records, tables
from dskd.corpus.finding import DATASET_STATE
from dskd.corpus.opening import open_text, reading_errors, without_compression

_SHOWN = 20


@dataclass(frozen=True)
class Document:
    """A text, a name for it that people can find it by, and the key by which it is put on one side of the split."""

    name: str
    text: str
    split_key: str
    continuation_tokens: int | None = None  # the teacher may go on with it by so many tokens; None: as the config says


def read_file(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of one file: the paragraphs of a text, or the records of JSON, Parquet, Arrow and MDS.

    Text and JSON may be compressed. The index of an MDS folder stands for the samples of all of its shards, and the
    `state.json` of a folder that `datasets` saved stands for its rows.

    Raises:
        UserError: naming the file, and the line or row, that cannot be read.
    """
    with reading_errors(path):
        yield from as_documents(str(path), _reader(path)(path, text_field))


def as_documents(source: str, texts: Iterable[tuple[int, str | None]]) -> Iterator[Document]:
    """Documents of the numbered texts of a source.

    Empty texts are left out. So are nulls, which are counted, and what is no text, with a warning.
    """
    left_out: list[int] = []
    nulls = 0
    for number, text in texts:
        if text is None:
            nulls += 1
            continue
        if "\0" in text or not _is_unicode(text):
            left_out.append(number)
            continue
        stripped = text.strip()
        if stripped:
            yield Document(f"{source}:{number}", stripped, stripped)
    if nulls:
        say(f"  {source}: {nulls:,} records without a text (null) are left out")
    if left_out:
        numbers = ", ".join(map(str, left_out[:_SHOWN])) + (", …" if len(left_out) > _SHOWN else "")
        warn(
            f"{source}: {len(left_out):,} documents are no text (a NUL or half a surrogate pair) and are left out: "
            f"{numbers}"
        )


def _reader(path: Path) -> Callable[[Path, str], Iterator[tuple[int, str | None]]]:
    if path.name == mds.INDEX:
        return tables.read_mds
    if path.name == DATASET_STATE:
        return tables.read_saved_dataset
    name = without_compression(path.name)
    if name.endswith(".parquet"):
        return tables.read_parquet
    if name.endswith(".arrow"):
        return tables.read_arrow
    return _read_paragraphs if name.endswith(".txt") else records.read_json


def _read_paragraphs(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
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


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can escape and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
