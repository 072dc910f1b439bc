"""Parses records into chats, in the two forms that data sets have.

`messages` is the form of OpenAI and transformers: turns with `role` and `content`, and for tools `tool_calls`, `name`
and `tool_call_id`; a record may also have `tools`, the functions that the assistant may call. `conversations` is the
form of ShareGPT: turns with `from` and `value`. Both become what chat templates expect, the first form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.corpus.records import RepeatedKeyError, unique_keys
from dskd.corpus.tables import describe_columns
from dskd.errors import UserError

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
# The names that ShareGPT's form has for these roles.
_SPEAKERS = {role: role for role in ROLES} | {"human": "user", "gpt": ASSISTANT}
_DEFAULT_TEXT_FIELD, _KEYS = "text", ("messages", "conversations")
_TOOLS, _SYSTEM = "tools", "system"
# Keys of records that would be parts of the chat, and where those belong.
_UNREAD = {
    "functions": "write them under 'tools'",
    "documents": "write them into a turn",
    "system_prompt": "rename it to 'system'",
    "system_message": "rename it to 'system'",
}
# Keys by which data sets weight a turn in the loss, or leave it out.
_WEIGHTS = ("weight", "loss", "train", "training")
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)

Message = dict[str, Any]


class ChatError(ValueError):
    """The error that is raised when a record is not a chat that can be trained on."""


@dataclass(frozen=True)
class Chat:
    """A chat, as chat templates read it: its turns, and the tools that the assistant may call (None: no tools)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    first_number: int = 1  # the number of the first message; 0 if it is not among the record's turns

    def answers(self) -> list[int]:
        """Returns the indices of the assistant's turns."""
        return [index for index, message in enumerate(self.messages) if message["role"] == ASSISTANT]


class ChatColumns:
    """The keys or columns in which records have chats: `corpus.text_field`, or `messages` or `conversations`."""

    def __init__(self, text_field: str) -> None:
        self.keys = _KEYS if text_field == _DEFAULT_TEXT_FIELD else (text_field,)
        self.all = (*self.keys, _TOOLS, _SYSTEM, *_UNREAD)  # all that may be part of a chat

    def __call__(self, path: Path, columns: Mapping[str, Any]) -> Sequence[str]:
        """Returns the columns of a file to read. Raises a UserError if none of them holds chats."""
        if not any(key in columns for key in self.keys):
            raise UserError(f"{path}: expected a column {self.named} of chats, but it has {describe_columns(columns)}")
        return [name for name in self.all if name in columns]

    @property
    def named(self) -> str:
        """The keys, for messages."""
        return " or ".join(map(repr, self.keys))

    def parse(self, record: Any) -> Chat:
        """Returns the chat of a record.

        Raises:
            ChatError: when the record has no turns, none of the assistant, two chats, an unknown role, a turn without
                text, or a part that would be ignored.
            RecursionError: when it is nested too deeply.
        """
        if not isinstance(record, Mapping):
            raise ChatError(f"expected an object with a chat under {self.named}, but it is not an object")
        messages = self._messages(record)
        system = record.get(_SYSTEM)
        if not isinstance(system, str | None):
            raise ChatError(f"{_SYSTEM!r} is of type {type(system).__name__} instead of text")
        has_system, first = bool((system or "").strip()), messages[0]
        adds_system = has_system and first["role"] != _SYSTEM
        if adds_system:
            messages.insert(0, {"role": _SYSTEM, "content": system})
        elif has_system and first["content"].strip() != (system or "").strip():
            raise ChatError(f"{_SYSTEM!r} and turn 1 (system) are different texts; remove one of them")
        for key, remedy in _UNREAD.items():
            # Nothing is lost if a turn has the text, too.
            if (value := record.get(key)) and not any(value == message["content"] for message in messages):
                raise ChatError(f"{key!r} would be ignored; {remedy}, or remove it")
        tools = record.get(_TOOLS)
        chat = Chat(messages, (_decoded(tools, repr(_TOOLS)) or None) if tools else None, 0 if adds_system else 1)
        if not chat.answers():
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ChatError(f"it has no turn of the assistant, only of {roles}")
        return chat

    def _messages(self, record: Mapping[str, Any]) -> list[Message]:
        """Returns the turns of a record as messages, at least one. Raises a ChatError if it has two different chats."""
        there = [key for key in self.keys if key in record]
        if not there:
            has = ", ".join(map(str, record)) or "no keys"
            raise ChatError(
                f"expected a chat under {self.named}, but it has {has}; name the key of the turns with "
                "corpus.text_field"
            )
        turns = {key: _decoded(record[key], repr(key)) for key in there if record[key] is not None}
        if not turns:
            raise ChatError(f"{' and '.join(map(repr, there))} is null; expected a list of turns")
        chats = [
            [_message(turn, number, _keys_of(record[key], number)) for number, turn in enumerate(each, start=1)]
            for key, each in turns.items()
            if each
        ]
        if not chats:
            raise ChatError(f"{' and '.join(map(repr, turns))} has no turns")
        if any(list(map(_said, chat)) != list(map(_said, chats[0])) for chat in chats):
            raise ChatError(f"{self.named.replace(' or ', ' and ')} are different chats; remove one of them")
        return chats[0]


def _keys_of(turns: Any, number: int) -> str:
    """Returns the keys of turn `number`, and says which are null; for messages. Turns that are JSON have no nulls of
    tables, so it returns an empty text for them.
    """
    if not isinstance(turns, list):
        return ""
    return ", ".join(key if value is not None else f"{key} (null)" for key, value in turns[number - 1].items())


def _said(message: Message) -> tuple[Any, ...]:
    return tuple(message.get(key) for key in ("role", "content", "tool_calls"))


def _decoded(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns a list of objects that may be written as JSON, as columns of tools often are; `name` is for messages."""
    if isinstance(value, str):
        try:
            value = DECODER.decode(value)
        except ValueError as error:
            raise ChatError(f"{name} is a string, but not valid JSON ({error})") from None
        except RepeatedKeyError as error:
            raise ChatError(f"{name}: {error}") from None
    else:
        value = _without_nulls(value)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ChatError(f"{name} is not a list of objects")
    return value


def _without_nulls(value: Any) -> Any:
    """Returns the value without keys that are null: tables have every key in every turn, and others leave them out."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _message(turn: Mapping[str, Any], number: int, keys: str) -> Message:
    """Returns turn `number`, counted from 1, as a message of a chat template; `keys` are its keys, for messages."""
    has = f"it has {keys or ', '.join(turn) or 'no keys'}; expected role and content, or from and value"
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if "role" in turn:
        roles, speaker = {role: role for role in ROLES}, turn["role"]
    elif "from" in turn:
        roles, speaker = _SPEAKERS, turn["from"]
        message["content"] = turn.get("value")
    else:
        raise ChatError(f"turn {number} has no speaker: {has}")
    if not isinstance(speaker, str) or speaker not in roles:
        raise ChatError(f"turn {number} has the role {speaker!r}; expected one of {', '.join(roles)}")
    message["role"] = roles[speaker]
    where = f"turn {number} ({message['role']})"
    _require_nothing_ignored(turn, where, message["role"])
    calls = message.pop("tool_calls", None)
    if calls:  # an empty list, as tables have, means none
        calls = _decoded(calls, f"{where}: 'tool_calls'")
        message["tool_calls"] = [
            _with_arguments(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)
        ]
    if message.get("content") is None and message["role"] == ASSISTANT and calls:
        message["content"] = ""  # a turn that only calls tools; templates join its content to texts
    content = message.get("content")
    if content is None:
        raise ChatError(f"{where} has no {'content' if 'role' in turn else 'value'}: {has}")
    if not isinstance(content, str):
        parts = "; parts are not supported, so join their texts" if isinstance(content, list) else ""
        raise ChatError(f"{where} has content of type {type(content).__name__} instead of text{parts}")
    if message["role"] == ASSISTANT and not content.strip() and not calls:
        raise ChatError(f"{where} is an empty answer, which would train the end of the turn alone; remove it")
    return message


def _require_nothing_ignored(turn: Mapping[str, Any], where: str, role: str) -> None:
    """Raises a ChatError if a turn has keys of both forms that differ, one that weights it, or OpenAI's older form of
    tool calls.
    """
    if "role" in turn and (other := turn.get("from")) is not None and _role_of(other) != role:
        raise ChatError(f"{where} is also from {other!r}; remove role or from")
    content, value = turn.get("content"), turn.get("value")
    if content is not None and value is not None and content != value:
        raise ChatError(f"{where} has different texts in content and value; remove one of them")
    if turn.get("function_call"):
        raise ChatError(f"{where} has function_call, which no chat template reads; write the call under tool_calls")
    for key in _WEIGHTS:
        if (weight := turn.get(key)) is not None and weight != 1:
            raise ChatError(
                f"{where} has {key}: {weight!r}; turns cannot be weighted or left out of the loss, so remove the key, "
                "or the chat"
            )


def _role_of(speaker: Any) -> str | None:
    return _SPEAKERS.get(speaker) if isinstance(speaker, str) else None


def _with_arguments(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a tool call with its arguments as an object: OpenAI writes them as JSON, and templates would encode
    them a second time. `where` names the call, for messages. Raises a ChatError if it names no function.
    """
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        problem = "has no name of a function" if name is None else f"has {name!r} as the name of a function"
        raise ChatError(f"{where} {problem}; expected function.name, a text")
    if not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        decoded = {**function, "arguments": DECODER.decode(arguments)}
    except ValueError:
        return call
    except RepeatedKeyError as error:
        raise ChatError(f"{where}: its arguments: {error}") from None
    return {**call, "function": decoded} if "function" in call else decoded
