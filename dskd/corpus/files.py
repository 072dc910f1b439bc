"""Documents in files: text, JSON lines and Parquet, found by paths, folders and globs, and folders of MDS shards.

Everything is read as a stream: no file is in memory whole, but for one shard of an MDS folder at a time.
"""

import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd import mds
from dskd.console import warn
from dskd.errors import UserError, listed
from dskd.manifest import digest_of_json
from dskd.manifest import fingerprint as fingerprint_of_file

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
MDS_INDEX = mds.INDEX
READABLE = f"{', '.join(SUFFIXES)} or a folder of MDS shards"
_PARQUET_ROWS = 1000
_SHOWN = 20
_PARQUET_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class Document:
    """A text, a name for it that people can find it by, and the key by which it is put on one side of the split."""

    name: str
    text: str
    split_key: str
    continuation_tokens: int | None = None  # the teacher may go on with it by so many tokens; None: as the config says


def expand(patterns: Sequence[str], key: str, *, workdir: Path) -> list[Path]:
    """The files with text that paths, folders and globs name, sorted, each once; for MDS shards, their index.

    Args:
        patterns: what the config names.
        key: the config's key, for messages.
        workdir: what is made from the text; folders around it, and globs that reach into it, are taken without it.

    Raises:
        UserError: with every pattern that names nothing readable.
    """
    files: dict[Path, Path] = {}  # by what they really are: one file has many names
    problems = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found: set[Path] = set()
        if path.is_file():
            found.add(path)
        else:
            named = [path] if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
            for place in named:
                found.update(_files_in(place) if place.is_dir() else [place])
            if not _fixed_part(path).resolve().is_relative_to(workdir.resolve()):
                found = {file for file in found if not file.resolve().is_relative_to(workdir.resolve())}
        if not found:
            problems.append(f"{key}: {pattern!r} names no file with text; give {READABLE}, or a folder or glob of them")
        problems += [f"{key}: {file}: expected {READABLE}" for file in sorted(found) if not _is_readable(file)]
        for file in sorted(found):
            files.setdefault(file.resolve(), file)
    if problems:
        raise UserError(listed("the text of the corpus cannot be found", problems))
    return sorted(_without_parts(files))


def fingerprint(path: Path) -> str:
    """A digest that changes with the content of what :func:`expand` found, without reading it.

    Large corpora are not read only to find that nothing changed: sizes and times of change stand for the content.
    """
    if path.name != MDS_INDEX:
        return fingerprint_of_file(path)
    named = [path.parent / name for shard in mds.read_index(path) for name in mds.files_of(shard)]
    return digest_of_json([fingerprint_of_file(file) for file in [path, *named] if file.is_file()])


def read_file(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of one file: paragraphs between empty lines of a `.txt`, lines of a `.jsonl`, rows of a `.parquet`.

    The first two may be compressed with gzip. The index of an MDS folder stands for the samples of all of its shards.

    Raises:
        UserError: naming the file, and the line or row, that cannot be read.
    """
    try:
        yield from as_documents(str(path), _reader(path)(path, text_field))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text ({error}); convert it, or leave it out") from None
    except EOFError:
        raise UserError(f"{path}: the compressed file ends too early; was its download or copy cut?") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: this is not whole gzip data ({error}); fetch it again, or leave it out") from None
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: this is not a readable Parquet file ({reason}); was its download cut?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def as_documents(source: str, texts: Iterable[tuple[int, str]]) -> Iterator[Document]:
    """Documents of the numbered texts of a source; empty ones are left out, and what is no text, with a warning."""
    left_out: list[int] = []
    for number, text in texts:
        if "\0" in text or not _is_unicode(text):
            left_out.append(number)
            continue
        stripped = text.strip()
        if stripped:
            yield Document(f"{source}:{number}", stripped, stripped)
    if left_out:
        numbers = ", ".join(map(str, left_out[:_SHOWN])) + (", …" if len(left_out) > _SHOWN else "")
        warn(
            f"{source}: {len(left_out):,} documents are no text (a NUL or half a surrogate pair) and are left out: "
            f"{numbers}"
        )


def _fixed_part(pattern: Path) -> Path:
    """A pattern's path up to its first wildcard."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    return Path(*parts)


def _files_in(folder: Path) -> list[Path]:
    """Every readable file below a folder, but for hidden ones. Indexes of other things than shards are passed over."""
    return [
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and _is_readable(file)
    ]


def _without_parts(files: Mapping[Path, Path]) -> list[Path]:
    """Leaves out the index of MDS shards that another one names as well: shards written in parallel have both."""
    named: dict[Path, set[Path]] = {
        real: {(real.parent / name).resolve() for shard in mds.read_index(real) for name in mds.files_of(shard)}
        for real in files
        if real.name == MDS_INDEX
    }
    return [
        file
        for real, file in files.items()
        if not any(real in named and other != real and named[real] < shards for other, shards in named.items())
    ]


def _is_readable(file: Path) -> bool:
    if file.name != MDS_INDEX:
        return file.name.lower().endswith(SUFFIXES)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and isinstance(index.get("shards"), list)


def _reader(path: Path) -> Callable[[Path, str], Iterator[tuple[int, str]]]:
    if path.name == MDS_INDEX:
        return _read_mds
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet
    return _read_jsonl if name.endswith((".jsonl", ".jsonl.gz")) else _read_paragraphs


def _open_text(path: Path) -> Any:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig")


def _read_paragraphs(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    start = 1
    lines: list[str] = []
    with _open_text(path) as stream:
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


def _read_jsonl(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    with _open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: this line is not JSON ({error})") from None
            if not (
                isinstance(record, dict) and record.get(text_field, "") is None
            ):  # null is no document, as elsewhere
                yield number, text_of(record, text_field, f"{path}:{number}")


def text_of(record: Any, text_field: str, place: str) -> str:
    """The text of a record.

    Raises:
        UserError: when there is none under `text_field`, with what there is.
    """
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        has = f"it has {', '.join(map(str, record)) or 'no keys'}" if isinstance(record, dict) else "it is no object"
        if isinstance(record, dict) and text_field in record:
            has = f"that is {json.dumps(record[text_field])[:60]}"
        raise UserError(f"{place}: expected an object with a text under {text_field!r}, but {has}")
    text: str = record[text_field]
    return text


def _read_parquet(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES) as file:
        columns = {field.name: field.type for field in file.schema_arrow}
        if text_field not in columns or not _holds_strings(columns[text_field]):
            raise UserError(_no_text_column(path, text_field, columns))
        number = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text is not None:
                    yield number, text


def _holds_strings(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_strings(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_mds(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    """Samples of the shards that an index names, numbered from 0 as mosaicml-streaming numbers them."""
    for shard in mds.read_index(path):
        columns = dict(zip(shard.get("column_names", ()), shard.get("column_encodings", ()), strict=False))
        if columns.get(text_field) != "str":
            raise UserError(_no_text_column(path, text_field, columns))
    for number, sample in enumerate(mds.read_samples(path, column=text_field)):
        yield number, sample[text_field]


def _no_text_column(path: Path, text_field: str, columns: dict[str, Any]) -> str:
    has = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "no columns"
    return f"{path}: expected a column {text_field!r} of strings, but it has {has}; name it with corpus.text_field"


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can escape and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
