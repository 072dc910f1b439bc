"""The parts of a turn that a chat template may leave out, and those without which the chat would be another one.

Collections of real chats note things about each turn next to it, such as `language` and `timestamp` (WildChat). No
template writes them, and nothing that was said is lost. Anything else that a template leaves out may be content.
"""

import re
from collections.abc import Iterator
from typing import Any

from dskd.corpus.chats.turns import ASSISTANT, Message

# Keys of turns that are checked in other ways, or that only say to which call a result belongs.
_OTHER_KEYS = ("role", "content", "tool_calls", "tool_call_id")
_KEY = re.compile(r"\w+")
# Keys of notes, however long: who said something when, where and with what, and what somebody thought of it.
_NOTES = frozenset(
    _KEY.findall(
        """
        id uuid index turn turn_id turn_identifier message_id parent_id parent_message_id conversation_id user_id
        timestamp time date created created_at create_time updated_at update_time
        language lang country state region hashed_ip header user_agent source url license model model_name
        redacted toxic toxicity moderation openai_moderation detoxify_moderation rating score rank status
        usage finish_reason stop_reason
        """
    )
)
# Keys of content, however short: what was said, shown or thought, and who said it.
_CONTENT = frozenset(
    _KEY.findall(
        """
        name reasoning reasoning_content thinking thinking_content thinking_blocks thought thoughts analysis refusal
        context tool_plan citations documents audio image images video videos file files attachments
        """
    )
)
_SHORT_TEXT, _SHORT_WORD = 32, 128  # characters
_WORD = re.compile(r"[!-~]*")  # such as a hash, a date or an address


def is_note(key: str, value: Any) -> bool:
    """Returns True if a key of a turn with this value is a note about the turn.

    A key of neither list is one if its texts are short: 32 characters together, or a word of 128 without a space.
    """
    if key.lower() in _NOTES:
        return True
    text = " ".join(_texts(value))
    longest = _SHORT_WORD if _WORD.fullmatch(text) else _SHORT_TEXT
    return key.lower() not in _CONTENT and len(text) <= longest


def other_keys(message: Message) -> Iterator[tuple[str, Any]]:
    """Yields the keys of a turn that some templates leave out, with their values: texts, lists and objects that are not
    empty.
    """
    for key, value in message.items():
        # The name of a tool that gives a result repeats that of the call.
        if key in _OTHER_KEYS or (key, message["role"]) == ("name", "tool"):
            continue
        if isinstance(value, str | list | dict) and (value.strip() if isinstance(value, str) else value):
            yield key, value


def without_a_part(message: Message) -> Iterator[tuple[str, Message]]:
    """Yields the parts of a turn that are content, each with the turn that lacks it or has another.

    These are what a system turn or a tool turn says, what the assistant says in addition to tool calls, each tool call,
    and other keys that are not notes, such as `reasoning_content` and `name`.
    """
    role, content, calls = message["role"], message["content"], message.get("tool_calls", [])
    if content.strip() and role != "user" and (role != ASSISTANT or calls):
        part = "the text next to the tool calls" if role == ASSISTANT else f"the {role} turn"
        yield part, {**message, "content": f"{content} and more"}
    for index in range(len(calls)):
        if len(calls) == 1:
            yield "the tool calls", {key: value for key, value in message.items() if key != "tool_calls"}
        else:
            yield f"tool call {index + 1}", {**message, "tool_calls": calls[:index] + calls[index + 1 :]}
    for key, value in other_keys(message):
        if not is_note(key, value):
            yield repr(key), without(message, {key})


def without(message: Message, keys: set[str]) -> Message:
    """Returns a turn without some of its keys."""
    return {key: value for key, value in message.items() if key not in keys}


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts in a value, at any depth; the keys of objects are none."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(each)
    if isinstance(value, str):
        yield value
