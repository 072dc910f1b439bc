"""Opens text files, compressed or not, and refuses at once files that are not text.

Files are read as streams, so no file is in memory as a whole.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from dskd.artifacts.pointers import refuse_pointer
from dskd.errors import UserError, first_line

_HEAD_CHARACTERS = 4096
_MARKUP = ("<!doctype html", "<html")
_SERVER_ERROR = "<error>"  # in the XML answer of an object store
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# The first bytes of compressed and binary files, to recognise them without the proper ending.
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"PK\x03\x04": ".zip",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}


def _open_zstd(path: Path) -> io.BufferedReader:
    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream, buffer_size=2**18)


_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".zst": _open_zstd,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
COMPRESSIONS = tuple(_OPENERS)


def without_compression(name: str) -> str:
    """Returns a file's name in lower case, without the ending of its compression."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)


@contextlib.contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a UTF-8 text file, and decompresses it if its ending says so; `newline` is passed to the text stream.

    Put :func:`reading_errors` around the block, for errors that appear later.

    Raises:
        UserError: when the file is a git pointer, empty although compressed, compressed without the ending for it, not
            UTF-8 text by its first bytes, or a server's error page.
    """
    refuse_pointer(path)
    ending = path.suffix.lower()
    with path.open("rb") as raw:
        start = raw.read(16)
    opener = _OPENERS.get(ending)
    if opener is not None and not start:
        raise UserError(f"{path}: the compressed file is empty; was its download or copy truncated?")
    if opener is None:
        _refuse_hidden_kind(path, start)
    with contextlib.ExitStack() as stack:
        buffered = stack.enter_context(opener(path) if opener else path.open("rb"))
        head = buffered.peek(_HEAD_CHARACTERS)[:_HEAD_CHARACTERS]
        _refuse_other_content(path, head)
        yield stack.enter_context(io.TextIOWrapper(buffered, encoding="utf-8-sig", newline=newline))


@contextlib.contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turns the errors of readers for a damaged file, or one that is not UTF-8 text, into a :class:`UserError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: this is not UTF-8 text ({error}); convert it (iconv -f LATIN1 -t UTF-8, if it is Latin-1), or "
            "leave it out"
        ) from None
    except EOFError:
        raise UserError(f"{path}: the compressed file ends too early; was its download or copy truncated?") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        kind = "xz" if isinstance(error, lzma.LZMAError) else "gzip"
        raise UserError(f"{path}: this is not whole {kind} data ({error}); fetch it again, or leave it out") from None
    except pa.ArrowException as error:
        kind = "Arrow" if path.suffix.lower() == ".arrow" else "Parquet"
        reason = first_line(error)
        raise UserError(f"{path}: this is not a readable {kind} file ({reason}); was its download truncated?") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if "Truncated compressed stream" in reason:
            reason = "the compressed file ends too early; was its download or copy truncated?"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _refuse_hidden_kind(path: Path, start: bytes) -> None:
    for magic, ending in _MAGIC.items():
        if start.startswith(magic):
            raise UserError(
                f"{path}: this is not plain text: its content is that of a {ending} file; give it that ending, or "
                "unpack it"
            )


def _refuse_other_content(path: Path, head: bytes) -> None:
    """Raises a UserError if the first bytes are UTF-16 or binary data, or a web server's page."""
    if head.startswith(_UTF_16_MARKS) or head.count(0) > len(head) // 4:
        raise UserError(
            f"{path}: this is not UTF-8 text: it looks like UTF-16 or binary data; convert it (iconv -f UTF-16 -t "
            "UTF-8), or leave it out"
        )
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(_MARKUP) or (text.startswith("<?xml") and _SERVER_ERROR in text):
        raise UserError(
            f"{path}: this is a page of a web server, perhaps an error message instead of the file: it begins with "
            f"{text[:40]!r}; fetch the file again, or leave it out"
        )
