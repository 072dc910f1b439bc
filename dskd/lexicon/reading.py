"""Streams text files of lexical resources line by line, plain or .gz, and records malformed lines.

The files are large and come from others, so malformed lines are skipped, counted and reported with their numbers. A
file that is not text at all, or whose lines are mostly malformed, is refused.
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
from dskd.errors import UserError, shortened

SHOWN_LINES = 20
# Far longer than any entry of Wiktionary. The limit stops the reader from loading a whole file without line ends.
MAX_LINE_BYTES = 64 * 2**20
_LINES_BETWEEN_UPDATES = 256
# Bytes unpacked at once. A buffer makes reading lines faster, but if a .gz breaks off, the lines in it are lost.
_BUFFER_BYTES = 2**16
_GZIP_MAGIC = b"\x1f\x8b"


class MalformedError(ValueError):
    """A line that does not have its file's format; the message says what is wrong."""


@dataclass
class Malformed:
    """The malformed lines of one file."""

    lines: int = 0
    first: list[int] = field(default_factory=list)  # numbers of the first SHOWN_LINES
    example: str = ""  # what is wrong with the first one


@dataclass
class Report:
    """A record of what the readers left out: malformed lines by file, and anything else by reason."""

    malformed: dict[str, Malformed] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)  # by file: malformed lines that never reached a reader

    def add_malformed(self, file: str, line: int, reason: str) -> None:
        """Records a line that was left out."""
        malformed = self.malformed.setdefault(file, Malformed(example=reason))
        malformed.lines += 1
        if len(malformed.first) < SHOWN_LINES:
            malformed.first.append(line)

    def finish(self, file: str, lines: int, expected: str) -> None:
        """Warns about the malformed lines of a file, after all of it was read.

        `lines` is the number of lines that reached the reader, without empty ones, and `expected` the format of a line,
        for the message. Raises a UserError when most lines are malformed, so that the file must have another format.
        """
        if file not in self.malformed:
            return
        problem = self.describe(file, lines, expected)
        if self.is_mostly_malformed(file, lines):
            raise UserError(f"{file}: {problem}; this is a file of another format: name the right one, or remove it")
        malformed = self.malformed[file]
        warn(f"{file}: {problem}; skipped lines: {shortened(malformed.first, total=malformed.lines)}")

    def is_mostly_malformed(self, file: str, lines: int) -> bool:
        """Returns True if more than half of a file's lines are malformed; `lines` as in :meth:`finish`."""
        malformed = self.malformed.get(file)
        return malformed is not None and malformed.lines * 2 > lines + self.unreadable[file]

    def describe(self, file: str, lines: int, expected: str) -> str:
        """Returns a text with the number of malformed lines of a file, and what is wrong with the first of them."""
        malformed = self.malformed[file]
        return (
            f"{malformed.lines:,} of {lines + self.unreadable[file]:,} lines are not {expected} (line "
            f"{malformed.first[0]}: {malformed.example})"
        )

    def facts(self) -> dict[str, dict[str, Any]]:
        """Returns `malformed` in the form that the manifest stores."""
        return {file: {"lines": lines.lines, "first": lines.first} for file, lines in self.malformed.items()}


def stream_lines(path: Path, report: Report | None = None) -> Iterator[tuple[int, str]]:
    """Yields (line number, line) for every line that is not empty; shows progress in bytes of the file on disk.

    With a report, lines that are not text (not UTF-8, with a NUL byte, or too long) are left out and added to it.
    Without a report, they are an error.

    Raises:
        UserError: when the file cannot be read, its first line is not text, or it is a .gz that ends early or is
            damaged; without a report also for any other line that is not text.
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
    """Returns False if a text has lone surrogates or NUL: JSON can express them, but text files and tables cannot."""
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
        raise UserError(f"{path}: the name ends in .gz, but this is not a gzip file; fetch it again, or rename it")
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
