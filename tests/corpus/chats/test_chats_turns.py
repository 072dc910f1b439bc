"""Records as chats: both forms of data sets, and what is refused."""

import json

import pytest

from dskd.corpus.chats.turns import ChatColumns, ChatError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}


def _parse(record, text_field="text"):
    return ChatColumns(text_field).parse(record)


@pytest.mark.parametrize(
    ("record", "text_field"),
    [
        ({"messages": MESSAGES}, "text"),
        ({"conversations": SHAREGPT, "id": 3}, "text"),
        ({"conversations": SHAREGPT[1:], "system": "Be brief."}, "text"),
        ({"messages": json.dumps(MESSAGES), "text": "another form of it"}, "text"),
        ({"messages": None, "conversations": MESSAGES}, "text"),
        ({"chosen": SHAREGPT, "messages": MESSAGES[:2]}, "chosen"),
        # As tables have them: every turn has the keys of all turns.
        ({"messages": [{**turn, "name": None, "tool_calls": None} for turn in MESSAGES], "tools": None}, "text"),
        ({"messages": [{**turn, "tool_calls": []} for turn in MESSAGES], "tools": []}, "text"),
    ],
)
def test_all_forms_are_the_same_chat(record, text_field):
    chat = _parse(record, text_field)
    assert chat.messages == MESSAGES
    assert chat.tools is None


def test_calls_of_tools_and_their_functions_are_objects():
    """Templates write them as JSON; texts of JSON, as OpenAI writes arguments, would become texts within JSON."""
    calls = [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}]
    turns = [MESSAGES[1], {"role": "assistant", "content": None, "tool_calls": calls}]
    turns.append({"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"})
    chat = _parse({"messages": turns, "tools": json.dumps([TOOL])})
    assert chat.tools == [TOOL]
    function = {"name": "add", "arguments": {"a": 1, "b": None}}
    assert chat.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "type": "function", "function": function}]},
        {"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"},
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": MESSAGES[:2]}, "it has no turn of the assistant, only of system, user"),
        ({"conversations": SHAREGPT[:2]}, "it has no turn of the assistant, only of system, user"),
        (
            {"messages": [*MESSAGES, {"role": "critic", "content": "x"}]},
            "turn 4 has the role 'critic'; expected one of ",
        ),
        ({"messages": [{"role": "human", "content": "x"}]}, "turn 1 has the role 'human'; .*system, developer, user"),
        ({"conversations": [{"from": "moderator", "value": "x"}]}, "turn 1 has the role 'moderator'; .*human, gpt"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"turn 1 has the role \['user'\]"),
        ({"messages": [{"text": "x"}]}, "turn 1 has text; expected role and content, or from and value"),
        ({"messages": [MESSAGES[1], {"role": "assistant"}]}, r"turn 2 \(assistant\) has no content"),
        ({"messages": [{"role": "user", "content": None}]}, r"turn 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of type list instead of text"),
        ({"conversations": [{"from": "human", "value": 3}]}, "content of type int instead of text"),
        ({"messages": [*MESSAGES[1:2], {**MESSAGES[2], "weight": 0}]}, "turn 2 has a weight of 0"),
        ({"messages": []}, "'messages' has no turns"),
        ({"messages": "Hi"}, "'messages' is a string, but not valid JSON"),
        ({"messages": {"role": "user"}}, "'messages' is not a list of objects"),
        ({"messages": ["Hi"]}, "'messages' is not a list of objects"),
        ({"messages": MESSAGES, "tools": ["add"]}, "'tools' is not a list of objects"),
        ({"prompt": "Hi", "completion": "Hello"}, "under 'messages' or 'conversations', but it has prompt, completion"),
        (MESSAGES, "expected an object with a chat"),
        (None, "expected an object with a chat"),
    ],
)
def test_what_is_no_chat_is_refused_with_the_turn(record, message):
    with pytest.raises(ChatError, match=message):
        _parse(record)
