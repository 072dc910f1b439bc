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

from dskd.corpus.tables import describe_columns
from dskd.errors import UserError

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
# The names that ShareGPT's form has for these roles.
_SPEAKERS = {role: role for role in ROLES} | {"human": "user", "gpt": ASSISTANT}
_DEFAULT_TEXT_FIELD, _KEYS = "text", ("messages", "conversations")
_TOOLS, _SYSTEM = "tools", "system"

Message = dict[str, Any]


class ChatError(ValueError):
    """The reason why a record is not a chat that can be trained on."""


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
        self.all = (*self.keys, _TOOLS, _SYSTEM)  # all that may be part of a chat

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
            ChatError: when the record has no turns, none of the assistant, an unknown role, or a turn without text.
        """
        if not isinstance(record, Mapping):
            raise ChatError(f"expected an object with a chat under {self.named}, but it is not an object")
        key = next((key for key in self.keys if record.get(key) is not None), None)
        if key is None:
            has = ", ".join(map(str, record)) or "no keys"
            raise ChatError(
                f"expected a chat under {self.named}, but it has {has}; name the key of the turns with "
                "corpus.text_field"
            )
        turns = _decoded(record[key], key)
        if not turns:
            raise ChatError(f"{key!r} has no turns")
        messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
        system = record.get(_SYSTEM)
        adds_system = isinstance(system, str) and bool(system.strip()) and messages[0]["role"] != _SYSTEM
        if adds_system:
            messages.insert(0, {"role": _SYSTEM, "content": system})
        tools = record.get(_TOOLS)
        chat = Chat(messages, (_decoded(tools, _TOOLS) or None) if tools else None, 0 if adds_system else 1)
        if not chat.answers():
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ChatError(f"it has no turn of the assistant, only of {roles}")
        return chat


def _decoded(value: Any, key: str) -> list[dict[str, Any]]:
    """Returns a list of objects that may be written as JSON, as columns of tools often are."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ChatError(f"{key!r} is a string, but not valid JSON ({error})") from None
    else:
        value = _without_nulls(value)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ChatError(f"{key!r} is not a list of objects")
    return value


def _without_nulls(value: Any) -> Any:
    """Returns the value without keys that are null: tables have every key in every turn, and others leave them out."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _message(turn: Mapping[str, Any], number: int) -> Message:
    """Returns turn `number`, counted from 1, as a message of a chat template."""
    if "role" in turn:
        roles, message = {role: role for role in ROLES}, dict(turn)
        speaker = message["role"]
    elif "from" in turn:
        roles, message = _SPEAKERS, {"content": turn["value"]} if "value" in turn else {}
        speaker = turn["from"]
    else:
        raise ChatError(
            f"turn {number} has {', '.join(turn) or 'no keys'}; expected role and content, or from and value"
        )
    if not isinstance(speaker, str) or speaker not in roles:
        raise ChatError(f"turn {number} has the role {speaker!r}; expected one of {', '.join(roles)}")
    message["role"] = roles[speaker]
    if calls := message.pop("tool_calls", None):  # an empty list, as tables have, means none
        message["tool_calls"] = [_with_arguments(call) for call in _decoded(calls, "tool_calls")]
    if "content" not in message and message["role"] == ASSISTANT and calls:
        message["content"] = ""  # a turn that only calls tools; templates join its content to texts
    content = message.get("content")
    if not isinstance(content, str):
        kind = "no content" if content is None else f"content of type {type(content).__name__} instead of text"
        raise ChatError(f"turn {number} ({message['role']}) has {kind}")
    if turn.get("weight", 1) != 1:
        raise ChatError(f"turn {number} has a weight of {turn['weight']!r}; turns cannot be weighted, so remove it")
    return message


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Returns a tool call with its arguments as an object: OpenAI writes them as JSON, and templates would encode
    them a second time.
    """
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        decoded = {**function, "arguments": json.loads(arguments)}
    except ValueError:
        return call
    return {**call, "function": decoded} if "function" in call else decoded
