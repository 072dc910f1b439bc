"""Which tool call a tool turn gives the result of: the one that its `tool_call_id` or `name` names or, if it has
neither, the one in its place.

Many templates write neither, so that a model sees the order alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dskd.corpus.chats.turns import ASSISTANT, ChatError, Message


@dataclass(frozen=True)
class _Result:
    index: int  # of the tool turn
    position: int  # among the results of the same turn of the assistant, from 0
    call: int | None  # the number of the call that it names, from 0; None if it names none


def find_misplaced_result(messages: list[Message], first_number: int) -> int | None:
    """Returns the index of the first tool turn whose place is not that of its call; None if there is none.

    `first_number` is the number of the first message.

    Raises:
        ChatError: when a tool turn names a call that the assistant has not made.
    """
    for result in _results(messages, first_number):
        if result.call not in (None, result.position):
            return result.index
    return None


def _results(messages: list[Message], first_number: int) -> Iterator[_Result]:
    """Yields the tool turns that follow a turn of the assistant with tool calls."""
    caller, position = 0, 0
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            caller, position = index, 0
            continue
        if messages[caller]["role"] == ASSISTANT and (calls := messages[caller].get("tool_calls")):
            whose = f"turn {index + first_number} (tool)"
            yield _Result(index, position, _named_call(message, calls, whose, f"turn {caller + first_number}"))
        position += 1


def _named_call(message: Message, calls: list[Any], whose: str, caller: str) -> int | None:
    """Returns the number of the call that a tool turn names; None if it names none, or several have that name."""
    ids, names = [call.get("id") for call in calls], [_name(call) for call in calls]
    identifier, name = message.get("tool_call_id"), message.get("name")
    if name and name not in names:
        raise ChatError(f"{whose} has the name {name!r}, but {caller} calls {', '.join(map(repr, names))}")
    if identifier and all(ids):
        if identifier not in ids:
            raise ChatError(
                f"{whose} has the tool_call_id {identifier!r}, but the calls of {caller} have "
                f"{', '.join(map(repr, ids))}"
            )
        if ids.count(identifier) == 1:
            number = ids.index(identifier)
            if name and name != names[number]:
                raise ChatError(f"{whose} has the name {name!r}, but its tool_call_id is that of {names[number]!r}")
            return number
    return names.index(name) if name and names.count(name) == 1 else None


def _name(call: Mapping[str, Any]) -> Any:
    return call.get("function", call).get("name")
