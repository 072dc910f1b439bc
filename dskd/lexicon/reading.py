"""Text files of lexical resources: streamed line by line, plain or .gz, with what is wrong in them remembered.

These files are other people's and large: a line that is not what its format says is left out, counted and reported with
its number. A file that is no text at all, or most of whose lines are wrong, is refused.
"""

import codecs
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dskd.artifacts.pointers import refuse_pointer_beginning
from dskd.console import progress_bar, warn
from dskd.errors import UserError

SHOWN_LINES = 20
# Longer than any entry of Wiktionary by far. A file without line ends must not be read into memory whole.
MAX_LINE_BYTES = 64 * 2**20
_LINES_BETWEEN_UPDATES = 256
# What is unpacked at once: lines are read faster from a buffer, and those in it are lost where a .gz breaks off.
_BUFFER_BYTES = 2**16
_GZIP_MAGIC = b"\x1f\x8b"


class MalformedError(ValueError):
    """A line that is not what its format says; the message says in which way."""


@dataclass
class Malformed:
    """The malformed lines of one file."""

    lines: int = 0
    first: list[int] = field(default_factory=list)  # numbers of the first SHOWN_LINES
    example: str = ""  # what is wrong with the very first


@dataclass
class Report:
    """What the readers did not take over: malformed lines by file, and anything else by reason."""

    malformed: dict[str, Malformed] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)  # by file: malformed lines that no reader was given

    def add_malformed(self, file: str, line: int, reason: str) -> None:
        """Remembers a line that was left out."""
        found = self.malformed.setdefault(file, Malformed(example=reason))
        found.lines += 1
        if len(found.first) < SHOWN_LINES:
            found.first.append(line)

    def finish(self, file: str, lines: int, expected: str) -> None:
        """Says what was malformed in a file that has been read.

        Args:
            file: as given to :meth:`add_malformed`.
            lines: how many the reader was given, without empty ones.
            expected: what a line should be, for the message.

        Raises:
            UserError: when it is most of the lines: then the file is of another format.
        """
        if file not in self.malformed:
            return
        what = self.describe(file, lines, expected)
        if self.is_mostly_malformed(file, lines):
            raise UserError(f"{file}: {what}; this is a file of another format: name the right one, or remove it")
        numbers = self.malformed[file]
        more = ", …" if numbers.lines > len(numbers.first) else ""
        warn(f"{file}: {what}; they are left out: {', '.join(map(str, numbers.first))}{more}")

    def is_mostly_malformed(self, file: str, lines: int) -> bool:
        """Returns whether more than half of a file's lines are malformed; `lines` as in :meth:`finish`."""
        found = self.malformed.get(file)
        return found is not None and found.lines * 2 > lines + self.unreadable[file]

    def describe(self, file: str, lines: int, expected: str) -> str:
        """Returns how many lines of a file are malformed, and in which way the first of them is."""
        found = self.malformed[file]
        return (
            f"{found.lines:,} of {lines + self.unreadable[file]:,} lines are not {expected} (line {found.first[0]}: "
            f"{found.example})"
        )

    def facts(self) -> dict[str, dict[str, Any]]:
        """`malformed` as it stands in the manifest."""
        return {file: {"lines": found.lines, "first": found.first} for file, found in self.malformed.items()}


def stream_lines(path: Path, report: Report | None = None) -> Iterator[tuple[int, str]]:
    """Yields (line number, line) for every line that is not empty, under a progress bar in bytes of the file on disk.

    With a report, lines that are no text (not UTF-8, with a NUL, or too long) go there and are left out; without, they
    are refused.

    Raises:
        UserError: when the file cannot be read, is binary from its first line on, or is a .gz that ends early or is
            damaged.
    """
    try:
        size = path.stat().st_size
        with (
            path.open("rb") as raw,
            progress_bar(total=size, label=f"reading {path.name}", unit="B") as bar,
            _uncompressed(raw, path) as stream,
        ):
            number = 0
            try:
                while line := stream.readline(MAX_LINE_BYTES):
                    number += 1
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if number % _LINES_BETWEEN_UPDATES == 0:
                        bar.update(raw.tell() - bar.n)
                    try:
                        text = _text(line)
                    except MalformedError as malformed:
                        if report is None or number == 1:
                            raise UserError(f"{path}:{number}: {malformed}; name a file of text in UTF-8") from None
                        report.add_malformed(str(path), number, str(malformed))
                        report.unreadable[str(path)] += 1
                        continue
                    if text:
                        yield number, text
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(
                    f"{path}: the gzip file ends early or is damaged ({error}): {number:,} lines could be read from "
                    f"{raw.tell():,} of its {size:,} bytes; fetch it again"
                ) from None
            bar.update(size - bar.n)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def is_storable(text: str) -> bool:
    """False for what JSON can escape and no text file or table can hold: lone surrogates, and NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


@contextmanager
def _uncompressed(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    beginning = raw.read(_BUFFER_BYTES)
    raw.seek(0)
    refuse_pointer_beginning(beginning, path)
    if beginning.startswith(_GZIP_MAGIC):
        with gzip.GzipFile(fileobj=raw) as inner, io.BufferedReader(inner, _BUFFER_BYTES) as stream:
            yield stream
    elif path.suffix == ".gz":
        raise UserError(f"{path}: the name ends in .gz, but this is no gzip file; fetch it again, or rename it")
    else:
        yield raw


def _text(line: bytes) -> str:
    if b"\0" in line:
        raise MalformedError("this is a binary file (there is a NUL byte)")
    if len(line) >= MAX_LINE_BYTES:
        raise MalformedError(f"this line is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise MalformedError(f"this is not UTF-8 text ({error.reason}, byte {error.start + 1} of the line)") from None
