"""Reads records from JSON files, with one object per line or one array of objects, and the text of one record."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dskd.corpus.opening import open_text
from dskd.errors import UserError, counted

CHATS = "docs/training.md#chat-and-instruction-data"
_READ_CHATS = f"Set corpus.source: chat, which reads chats, as {CHATS} shows"
_CHUNK_CHARACTERS = 2**20
_LARGEST_ELEMENT = 2**30  # characters; stops the reader from loading a whole file that is not JSON
# Keys under which data sets have chats, and sets of keys under which they have an instruction and its answer.
CHAT_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue", "mapping")
_INSTRUCTION_KEYS = (
    {"instruction", "output"},
    {"instruction", "response"},
    {"prompt", "completion"},
    {"prompt", "response"},
    {"prompt", "chosen"},
    {"chosen", "rejected"},
    {"question", "answer"},
    {"question", "response"},
    {"inputs", "targets"},
)


class RepeatedKeyError(Exception):
    """The error that is raised when an object has the same key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON, as an `object_pairs_hook`. Raises a RepeatedKeyError if it has a key twice; without
    this hook the last of them counts.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise RepeatedKeyError(f"an object has the key {repeated!r} twice; remove one of them")
    return values


def read_json(path: Path, decoder: json.JSONDecoder | None = None) -> Iterator[tuple[int, Any]]:
    """Yields (number, record) for a JSON file: the number is that of the line, or in the array, from 1.

    Raises a UserError that names a line or element which is not JSON, or which `decoder` refuses with a
    RepeatedKeyError.
    """
    decoder = decoder or json.JSONDecoder()
    with open_text(path) as stream:
        start = stream.readline(_CHUNK_CHARACTERS)
        blank = 0
        while start.isspace():
            blank += 1
            start = stream.readline(_CHUNK_CHARACTERS)
        is_array = start.lstrip().startswith("[")
        numbered = _elements(path, start, stream, decoder) if is_array else _lines(path, start, stream, blank, decoder)
        yield from numbered


def text_of(record: Any, text_field: str, location: str) -> str | None:
    """Returns the text of a record, or None if it is null. If there is none under `text_field`, the UserError says what
    the record has instead.
    """
    if isinstance(record, dict) and text_field in record and isinstance(record[text_field], str | None):
        return record[text_field]
    expected = f"{location}: expected an object with a text under {text_field!r}, but"
    if isinstance(record, list) and (is_chat(record) or (record and all(map(is_chat, record)))):
        raise UserError(f"{expected} this is a chat: a list of {len(record)}. {_READ_CHATS}")
    if is_chat([record]):
        raise UserError(f"{expected} this is one turn of a chat. {_READ_CHATS}")
    if not isinstance(record, dict):
        raise UserError(f"{expected} it is not an object")
    if chat := _chat(record):
        raise UserError(f"{expected} this is a chat: {chat}. {_READ_CHATS}")
    if has_instruction(record):
        raise UserError(
            f"{expected} it has {', '.join(map(str, record))}: an instruction and its answer. Write them as a chat, as "
            f"{CHATS} shows"
        )
    if text_field in record:
        raise UserError(f"{expected} that is {json.dumps(record[text_field])[:60]}")
    raise UserError(
        f"{expected} it has {', '.join(map(str, record)) or 'no keys'}; name the key of the text with corpus.text_field"
    )


def is_chat(turns: Any) -> bool:
    """Returns True if a value is a list of turns: objects with a speaker and what they say."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(
            isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in turns
        )
    )


def has_instruction(keys: Iterable[str]) -> bool:
    """Returns True if the keys of a record, or the names of columns, are those of an instruction and its answer."""
    names = set(keys)
    return any(needed <= names for needed in _INSTRUCTION_KEYS)


def _chat(record: dict[str, Any]) -> str:
    """Describes the chat in a record; returns an empty text if there is none."""
    for key, turns in record.items():
        if is_chat(turns):
            speaker = turns[0].get("role", turns[0].get("from"))
            return f"{key!r} has {counted(len(turns), 'turn')}, the first by {speaker!r}"
        if key in CHAT_KEYS and isinstance(turns, (list, dict)):
            return f"{key!r} is {'a list' if isinstance(turns, list) else 'an object'} of {len(turns)}"
        if key in CHAT_KEYS and isinstance(turns, str):
            return f"{key!r} is a text, of JSON as it seems" if turns.lstrip()[:1] in ("[", "{") else f"{key!r}"
    return ""


def _lines(path: Path, start: str, stream: TextIO, blank: int, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    # The first line may be longer than the part that was read.
    line = start if start.endswith("\n") else start + stream.readline()
    number = blank
    while line:
        number += 1
        if line.strip():
            try:
                record = decoder.decode(line)
            except (ValueError, RecursionError) as error:
                hint = ""
                if number == blank + 1 and line.strip() in ("{", "[", '{"'):
                    hint = "; expected an object a line, or one array of objects"
                raise UserError(f"{path}:{number}: this line is not JSON ({error}){hint}") from None
            except RepeatedKeyError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            yield number, record
        line = stream.readline()


def _elements(path: Path, start: str, stream: TextIO, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """Yields (number, element) for a JSON array, decoding one element at a time, so that it is never all in memory."""
    buffer, at, number = start.lstrip(), 1, 0
    is_whole = False  # True when the buffer contains the end of the file

    def fill() -> None:
        nonlocal buffer, at, is_whole
        # Read at least as much again as the unfinished element has so far: doubling keeps the total time linear in its
        # length.
        more = stream.read(max(_CHUNK_CHARACTERS, len(buffer) - at))
        is_whole = not more
        buffer, at = buffer[at:] + more, 0

    def skip_blanks() -> None:
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer) or is_whole:
                return
            fill()

    skip_blanks()
    while buffer[at : at + 1] != "]":
        while True:
            try:
                element, end = decoder.raw_decode(buffer, at)
                # A number at the end of the buffer could continue in text that is not read yet.
                if end < len(buffer) or is_whole:
                    break
            except (ValueError, RecursionError) as error:
                if is_whole or isinstance(error, RecursionError) or len(buffer) - at > _LARGEST_ELEMENT:
                    raise UserError(f"{path}: element {number + 1} of the array is not JSON ({error})") from None
            except RepeatedKeyError as error:
                raise UserError(f"{path}: element {number + 1} of the array: {error}") from None
            fill()
        number, at = number + 1, end
        yield number, element
        skip_blanks()
        after = buffer[at : at + 1]
        if after not in (",", "]"):
            raise UserError(
                f"{path}: after element {number} of the array: expected , or ], found "
                f"{repr(after) if after else 'the end of the file'}; was its download truncated?"
            )
        if after == ",":
            at += 1
            skip_blanks()
            if buffer[at : at + 1] in ("]", ""):
                raise UserError(f"{path}: after element {number} of the array: a comma, and no element after it")
    at += 1
    skip_blanks()
    if at < len(buffer):
        raise UserError(f"{path}: there is more text after its array; expected one array, or an object a line")
