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
        ({"messages": [], "conversations": SHAREGPT}, "text"),
        ({"messages": MESSAGES, "conversations": SHAREGPT}, "text"),
        ({"messages": MESSAGES, "system": "Be brief."}, "text"),
        ({"messages": MESSAGES, "system_message": "Be brief.", "functions": [], "documents": None}, "text"),
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


@pytest.mark.parametrize("more", [{"weight": 1}, {"train": True, "loss": 1.0}, *SHAREGPT[1:2]])
def test_keys_that_change_nothing_are_accepted(more):
    chat = _parse({"messages": [MESSAGES[0], {**MESSAGES[1], **more}, MESSAGES[2]]})
    assert [(message["role"], message["content"]) for message in chat.messages] == [
        (turn["role"], turn["content"]) for turn in MESSAGES
    ]


def test_turns_of_both_forms_keep_their_other_keys():
    """So that rendering can check whether the template writes them."""
    first = _parse({"messages": [MESSAGES[1], {**MESSAGES[2], "reasoning_content": "Greet."}]})
    second = _parse({"conversations": [SHAREGPT[1], {**SHAREGPT[2], "reasoning_content": "Greet."}]})
    assert first.messages == second.messages
    assert first.messages[1]["reasoning_content"] == "Greet."


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
        ({"messages": [{"text": "x"}]}, "turn 1 has no speaker: it has text; expected role and content, or from and"),
        ({"messages": [MESSAGES[1], {"role": "assistant"}]}, r"turn 2 \(assistant\) has no content"),
        ({"messages": [{"role": "user", "content": None}]}, r"turn 1 \(user\) has no content: .* content \(null\);"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "content of type list instead of text; parts are not",
        ),
        ({"conversations": [{"from": "human", "value": 3}]}, "content of type int instead of text"),
        (
            {"messages": [*MESSAGES[1:2], {**MESSAGES[2], "weight": 0}]},
            r"turn 2 \(assistant\) has weight: 0; turns cannot",
        ),
        (
            {"messages": [*MESSAGES[1:2], {**MESSAGES[2], "train": False}]},
            r"turn 2 \(assistant\) has train: False; turns",
        ),
        ({"messages": [*MESSAGES[1:2], {**MESSAGES[2], "loss": 0.0}]}, r"turn 2 \(assistant\) has loss: 0\.0; turns"),
        ({"conversations": [*SHAREGPT[1:2], {**SHAREGPT[2], "training": 0}]}, r"turn 2 \(assistant\) has training: 0"),
        ({"messages": [MESSAGES[1], {**MESSAGES[2], "content": " "}]}, r"turn 2 \(assistant\) is an empty answer"),
        ({"messages": [{**MESSAGES[1], "from": "gpt"}, MESSAGES[2]]}, r"turn 1 \(user\) is also from 'gpt'; remove"),
        (
            {"messages": [{**MESSAGES[1], **SHAREGPT[2], "from": "human"}]},
            r"turn 1 \(user\) has different texts in content and value; remove one",
        ),
        (
            {"conversations": [{"from": "human", "content": "Hi"}]},
            r"turn 1 \(user\) has no value: it has from, content; expected role and content, or from and value",
        ),
        ({"messages": [{**MESSAGES[2], "tool_calls": ["x"]}]}, r"turn 1 \(assistant\): 'tool_calls' is not a list of"),
        (
            {"messages": [{**MESSAGES[2], "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}]},
            r"turn 1 \(assistant\): tool call 1: its arguments: an object has the key 'a' twice",
        ),
        (
            {"messages": [{**MESSAGES[2], "tool_calls": [TOOL, {}]}]},
            r"turn 1 \(assistant\): tool call 2 has no name of a function; expected function\.name",
        ),
        (
            {"messages": [{**MESSAGES[2], "tool_calls": [{"function": {"name": 3, "arguments": {}}}]}]},
            r"turn 1 \(assistant\): tool call 1 has 3 as the name of a function",
        ),
        (
            {"messages": [{**MESSAGES[2], "tool_calls": [{"function": "add", "name": "add"}]}]},
            r"turn 1 \(assistant\): tool call 1 has no name of a function",
        ),
        (
            {"messages": [{**MESSAGES[2], "function_call": {"name": "add", "arguments": "{}"}}]},
            r"turn 1 \(assistant\) has function_call, .*; write the call under tool_calls",
        ),
        ({"conversations": [{**SHAREGPT[2], "function_call": {"name": "add"}}]}, r"\(assistant\) has function_call"),
        (
            {"messages": [{"role": None, "content": "x"}]},
            r"turn 1 has no speaker: it has role \(null\), content; expected role and content",
        ),
        ({"messages": '[{"role": "user", "role": "assistant"}]'}, "'messages': an object has the key 'role' twice"),
        ({"messages": MESSAGES, "system": ["x"]}, "'system' is of type list instead of text"),
        ({"messages": MESSAGES, "system": 3}, "'system' is of type int instead of text"),
        (
            {"messages": MESSAGES, "functions": [TOOL]},
            "'functions' would be ignored; write them under 'tools', or remove",
        ),
        ({"messages": MESSAGES, "documents": [{"text": "x"}]}, "'documents' would be ignored; write them into a turn"),
        (
            {"messages": MESSAGES, "system_prompt": "Be long."},
            "'system_prompt' would be ignored; rename it to 'system'",
        ),
        (
            {"messages": MESSAGES, "system": "Be long."},
            r"'system' and turn 1 \(system\) are different texts; remove one",
        ),
        ({"messages": MESSAGES, "conversations": SHAREGPT[1:]}, "'messages' and 'conversations' are different chats"),
        ({"messages": None}, "'messages' is null; expected a list of turns"),
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
def test_a_record_that_is_not_a_chat_is_refused_with_the_turn(record, message):
    with pytest.raises(ChatError, match=message):
        _parse(record)
