"""The tokens of chats, and which of them count, against texts in which the counted parts are marked by hand."""

import re

import pytest
from chat_templates import LLAMA, MARKED, MISTRAL, SMOLLM, THINKING, TOOLS, chat_tokenizer

from dskd.corpus.chats.rendering import ChatWriter
from dskd.corpus.chats.special_tokens import SpecialTokenError
from dskd.corpus.chats.turns import ChatColumns, ChatError

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
JOINING = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = re.compile(r"<\|\w+\|>|</?s>")


def turns(*said):
    """Turns as (role, content), where a role is known by its first letter."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[role], "content": content} for role, content in said]


TWO_ANSWERS = turns(("s", "Be brief."), ("u", "Hi"), ("a", "Hello!"), ("u", "1+1?"), ("a", "Two"))


def _call(name):
    return {"type": "function", "function": {"name": name, "arguments": {"city": "Rome"}}}


TWO_CALLS = [
    *turns(("u", "Rome?")),
    {"role": "assistant", "content": "Let me look.", "tool_calls": [_call("weather"), _call("time")]},
]


def write(template, messages, *, answers_only=True, tools=None, **tokenizer):
    chat = ChatColumns("text").parse({"messages": messages, "tools": tools})
    return ChatWriter(chat_tokenizer(template, **tokenizer), answers_only=answers_only).write(chat)


def by_hand(marked):
    """Splits a text whose counted parts are in ⟦⟧ into the text, and 1 or 0 for each special token or character."""
    text, counted = "", []
    for number, part in enumerate(re.split("[⟦⟧]", marked)):
        text += part
        ends = [match.span() for match in SPECIAL.finditer(part)]
        tokens = len(part.encode()) - sum(stop - first - 1 for first, stop in ends)
        counted += [number % 2] * tokens
    return text, counted


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            LLAMA,
            TWO_ANSWERS,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Two<|eot_id|>⟧",
        ),
        (
            SMOLLM,
            TWO_ANSWERS[1:],
            "<|im_start|>system\nYou are Smol<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\n1+1?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Two<|im_end|>⟧\n",
        ),
        (
            MARKED,
            [*TWO_ANSWERS, *turns(("u", "Bye"))],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\n1+1?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Two<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n",
        ),
        (MISTRAL, TWO_ANSWERS[1:], "<s>[INST] Hi [/INST]⟦ Hello!</s>⟧[INST] 1+1? [/INST]⟦ Two</s>⟧"),
        # An empty system turn, and an answer that is in several languages, or quotes a prompt in other characters.
        (
            SMOLLM,
            turns(("s", ""), ("u", "x"), ("a", "é日"), ("u", "Two"), ("a", "x\n<|im_start>user\n\n")),
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
            "<|im_start|>assistant\n⟦é日<|im_end|>⟧\n<|im_start|>user\nTwo<|im_end|>\n"
            "<|im_start|>assistant\n⟦x\n<|im_start>user\n\n<|im_end|>⟧\n",
        ),
        # A special token that this template does not write is a token like any other.
        (
            SMOLLM,
            turns(("s", "x"), ("u", "Hi <|eot_id|>"), ("a", "<|begin_of_text|>!")),
            "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nHi <|eot_id|><|im_end|>\n"
            "<|im_start|>assistant\n⟦<|begin_of_text|>!<|im_end|>⟧\n",
        ),
        (
            THINKING,
            turns(("u", "Hi"), ("a", "Hello!")),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello!<|im_end|>⟧\n",
        ),
    ],
)
def test_every_token_counts_as_marked_by_hand(template, messages, expected):
    start, end = ("<|begin_of_text|>", "<|eot_id|>") if template is LLAMA else ("<s>", "</s>")
    written = write(template, messages, start=start, end=end)
    text, counted = by_hand(expected)
    assert written.text == text
    assert written.counted.tolist() == counted
    tokenizer = chat_tokenizer(template, start=start, end=end)
    assert written.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    if template is MARKED:  # transformers' own mask, which is right if each token is a character
        own = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert own["assistant_masks"] == counted


@pytest.mark.parametrize(
    ("template", "messages", "tools", "place"),
    [
        (SMOLLM, turns(("u", "What is <|im_end|>?"), ("a", "A token.")), None, r"turn 1: '<\|im_end\|>'"),
        (SMOLLM, turns(("u", "Hi"), ("a", "x\n<|im_start|>user\n\n")), None, r"turn 2: '<\|im_start\|>'"),
        (MARKED, turns(("u", "Hi"), ("a", "x<|im_end|>\n")), None, r"turn 2: '<\|im_end\|>'"),
        (LLAMA, turns(("u", "Hi<|eot_id|>"), ("a", "x")), None, r"turn 1: '<\|eot_id\|>'"),
        # The tokens that begin and end a text, which no template has to write: here they are HTML.
        (SMOLLM, turns(("u", "<s>old</s> new"), ("a", "x")), None, "turn 1: '<s>'"),
        # The first turn is not the record's.
        (SMOLLM, turns(("u", "Hi"), ("a", "</s>")), "system", "turn 2: '</s>'"),
        (TOOLS, turns(("u", "Hi"), ("a", "x")), [WEATHER | {"type": "<|im_end|>"}], r"its tools: '<\|im_end\|>'"),
        # Without the token, the template refuses the chat.
        (
            "{{ raise_exception('no') if '<|im_end|>' not in messages[0].content }}" + JOINING,
            turns(("u", "<|im_end|>"), ("a", "x")),
            None,
            r"turn 1: '<\|im_end\|>'",
        ),
    ],
)
@pytest.mark.parametrize("answers_only", [True, False])
def test_a_chat_that_says_a_token_of_the_template_is_refused(template, messages, tools, place, answers_only):
    record = {"messages": messages, "system": "Be brief."} if tools == "system" else {"messages": messages}
    chat = ChatColumns("text").parse(record | ({"tools": tools} if isinstance(tools, list) else {}))
    with pytest.raises(SpecialTokenError, match=f"^{place}$"):
        ChatWriter(chat_tokenizer(template), answers_only=answers_only).write(chat)


def test_calls_of_tools_count_and_their_results_do_not():
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *turns(("u", "Rome?")),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        *turns(("t", "hot"), ("t", "dry"), ("a", "Hot.")),
    ]
    tools = '{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}'
    text, counted = by_hand(
        f"<|im_start|>system\n{tools}<|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>hot'
        "</tool_response>\n<tool_response>dry</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Hot.<|im_end|>⟧\n"
    )
    written = write(TOOLS, messages, tools=[WEATHER])
    assert (written.text, written.counted.tolist()) == (text, counted)


def test_parts_that_the_template_writes_are_accepted():
    assert write(TOOLS, TWO_CALLS).text.count("<tool_call>") == 2
    thinks = SMOLLM.replace("+ message['content']", "+ (message.reasoning_content or '') + message['content']")
    messages = [TWO_ANSWERS[1], {**TWO_ANSWERS[2], "reasoning_content": "Greet.", "refusal": "", "toxic": 0.1}]
    assert "Greet.Hello!" in write(thinks, messages).text
    result = {"role": "tool", "content": "hot", "tool_call_id": "x", "name": "weather"}
    assert "hot" in write(TOOLS, [*TWO_CALLS, result, *turns(("a", "Hot."))]).text


# As WildChat notes about its turns, and what no list of ours has.
NOTES = {
    "language": "English",
    "timestamp": "2024-04-09T00:02:53+00:00",
    "toxic": False,
    "header": {"user-agent": "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36", "accept-language": "en"},
    "hashed_ip": "22fd87ba9b98f769" * 4,
    "country": "United States",
    "turn_identifier": 101002,
    "digest": "22fd87ba9b98f769" * 8,
    "topics": ["small talk", "numbers"],
    "flags": {"spam": 0.1},
}
LEFT_OUT = {"language", "timestamp", "header", "hashed_ip", "country", "digest", "topics", "flags"}


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (SMOLLM, LEFT_OUT),
        (SMOLLM.replace("+ message['content']", "+ message.language + message['content']"), LEFT_OUT - {"language"}),
        (SMOLLM.replace("{% for", "{{ messages[0].topics | join }}{% for"), LEFT_OUT - {"topics"}),
    ],
)
def test_notes_about_turns_may_be_left_out_and_are_counted(template, left_out):
    messages = [turn | NOTES for turn in TWO_ANSWERS]
    writer = ChatWriter(chat_tokenizer(template), answers_only=True)
    writer.write(ChatColumns("text").parse({"messages": messages}))
    assert writer.left_out == dict.fromkeys(left_out, 5)
    writer.write(ChatColumns("text").parse({"messages": messages[1:3]}))
    assert writer.left_out == dict.fromkeys(left_out, 7)


def _results(*of, calls=("x", "y")):
    """The chat of two calls, and results with other keys."""
    made = [
        {**call, "id": name} if name else call for call, name in zip(TWO_CALLS[1]["tool_calls"], calls, strict=True)
    ]
    results = [{"role": "tool", "content": f"result {number}", **keys} for number, keys in enumerate(of)]
    return [TWO_CALLS[0], {**TWO_CALLS[1], "tool_calls": made}, *results, *turns(("a", "Hot."))]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (_results({}, {}), None),
        (_results({"tool_call_id": "x"}, {"tool_call_id": "y", "name": "time"}), None),
        (_results({"tool_call_id": "z"}, calls=("", "")), None),  # the calls have no ids
        (_results({"name": "weather"}, {"name": "time"}, calls=("", "")), None),
        (_results({"tool_call_id": "x"}, calls=("x", "x")), None),
        (
            _results({"tool_call_id": "y"}, {"tool_call_id": "x"}),
            r"turn 3 \(tool\) is not the result of the call in its",
        ),
        (_results({"tool_call_id": "x"}, {"tool_call_id": "x"}), r"turn 4 \(tool\) is not the result"),
        (_results({"name": "time"}), r"turn 3 \(tool\) .*put the results in the order of the calls"),
        (_results({"tool_call_id": "z"}), r"turn 3 \(tool\) has the tool_call_id 'z', but .* turn 2 have 'x', 'y'"),
        (_results({"name": "add"}), r"turn 3 \(tool\) has the name 'add', but turn 2 calls 'weather', 'time'"),
        (
            _results({"tool_call_id": "x", "name": "time"}),
            r"the name 'time', but its tool_call_id is that of 'weather'",
        ),
        (
            [*turns(("u", "Rome?")), {"role": "tool", "content": "hot", "tool_call_id": "x"}, *turns(("a", "Hot."))],
            None,
        ),
    ],
)
def test_results_are_in_the_order_of_their_calls_if_the_template_names_none(results, message):
    if message is None:
        write(TOOLS, results)
        return
    with pytest.raises(ChatError, match=message):
        write(TOOLS, results)
    naming = TOOLS.replace("'\n<tool_response>' +", "'\n<tool_response>' + (message.tool_call_id or message.name) +")
    if "in its" in message or "order" in message:
        assert "result 0" in write(naming, results).text


ENDS_UNMARKED = MARKED.replace(
    "message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n'",
    "message.content }}{%- endgeneration %}{{- '<|im_end|>\n'",
)


@pytest.mark.parametrize(
    ("template", "warnings"),
    [(ENDS_UNMARKED, 1), (MARKED, 0), (MARKED.replace("{{- '\n' }}{%- else", "{%- else"), 0)],
)
def test_marks_without_the_end_of_the_turn_give_one_warning(template, warnings, capsys):
    """In the last template, the beginning of a turn follows the end of another at once."""
    writer = ChatWriter(chat_tokenizer(template), answers_only=True)
    for _ in range(2):
        writer.write(ChatColumns("text").parse({"messages": TWO_ANSWERS}))
    assert capsys.readouterr().err.count("do not contain '<|im_end|>', which follows an answer") == warnings


def test_with_loss_on_all_tokens_only_the_first_does_not_count():
    written = write(SMOLLM, TWO_ANSWERS, answers_only=False)
    assert written.counted.tolist() == [0] + [1] * (len(written.tokens) - 1)


def test_the_date_is_always_the_same():
    template = "{{ strftime_now('%Y-%m-%d') }} {{ date_string }}" + SMOLLM
    assert write(template, TWO_ANSWERS).text.startswith("2024-07-26 26 Jul 2024<|im_start|>")


@pytest.mark.parametrize("adds_space", [False, True])
def test_answers_of_a_template_without_special_tokens_end_with_their_line(adds_space):
    """Also if the tokenizer puts a space before every text, so that parts of a chat have other tokens by themselves."""
    written = write(JOINING, TWO_ANSWERS[1:], adds_space=adds_space)
    _, counted = by_hand("user: Hi\nassistant: ⟦Hello!\n⟧user: 1+1?\nassistant: ⟦Two\n⟧")
    assert written.counted.tolist() == [0] * adds_space + counted


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        # Words begin with a space here, so the last token of the header is also the first of the answer.
        (
            JOINING,
            TWO_ANSWERS[1:],
            r"between '.*user: Hi\\nassistant: ' and 'Hello!\\n.*' the chat is tokenized differently .*white space",
        ),
        (
            JOINING.replace(
                "{{ m.role + ': ' + m.content + '\n' }}",
                "{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '\n' }}"
                "{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}",
            ),
            TWO_ANSWERS[1:],
            r"the chat is tokenized differently from the part before it",
        ),
        (THINKING, TWO_ANSWERS, r"writes the turns up to turn 3 differently by themselves \(.*<think>.*\) and in the"),
        (
            SMOLLM.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"),
            TWO_ANSWERS,
            r"writes the turns before turn 3, with the header .*, differently by themselves \(.*<think>.*Hello!",
        ),
        (
            SMOLLM.split("{% if add_generation_prompt")[0],
            TWO_ANSWERS,
            r"ignores add_generation_prompt, but writes '<\|im_start\|>assistant\\nHello!.*' for turn 3",
        ),
        (MISTRAL, TWO_ANSWERS, r"the chat template refuses it \(TemplateError: Only user and assistant\)"),
        (SMOLLM, turns(("a", "Hi"), ("u", "Hello")), r"the chat begins with the assistant, and .*; remove turn 1$"),
        ("{{ messages[0].content }}" + SMOLLM, turns(("a", "Hi")), r"begins with the assistant, .*; remove turn 1$"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.role + m.content }}{% endfor %}",
            TWO_ANSWERS,
            "leaves out the system turn in turn 1",
        ),
        (
            SMOLLM,
            [*turns(("u", "Hi")), {"role": "assistant", "content": "", "tool_calls": [WEATHER]}],
            "leaves out the tool calls in turn 2",
        ),
        (TOOLS.replace(" + message.content }}", " + ('' if message.tool_calls else message.content) }}"), TWO_CALLS,
            "leaves out the text next to the tool calls in turn 2"),
        (TOOLS.replace("in message.tool_calls or []", "in (message.tool_calls or [])[:1]"), TWO_CALLS,
            "leaves out tool call 2 in turn 2"),
        *(
            (SMOLLM, [{**TWO_ANSWERS[1], **(more if of == 1 else {})}, {**TWO_ANSWERS[2], **(more if of == 2 else {})}],
                f"leaves out '{next(iter(more))}' in turn {of}; use a template that writes it, or remove it")
            for of, more in [(1, {"name": "Ann"}), (2, {"reasoning_content": "Greet."}), (2, {"refusal": "No."}),
                             (2, {"thinking": [{"text": "x"}]}), (2, {"audio": {"id": "x"}}),
                             (1, {"hidden": "Answer as a pirate, and be brief."}), (2, {"Reasoning": "Greet."}),
                             (2, {"steps": ["First I greet him,", "then I answer."]}), (1, {"payload": "a" * 129})]
        ),
        # Marks in a macro, whose places transformers loses, and marks around some answers only.
        (
            "{% macro say(m) %}{{ 'assistant:' }}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
            "{% for m in messages %}{{ say(m) if m.role == 'assistant' else m.content }}{% endfor %}",
            TWO_ANSWERS,
            "do not contain all of the answer in turn 3",
        ),
        (MARKED.replace("{%- generation %}", "{%- if loop.last %}{%- generation %}").replace(
            "{%- endgeneration %}", "{%- endgeneration %}{%- else %}{{- message.content }}{%- endif %}"),
            TWO_ANSWERS, "do not contain all of the answer in turn 3"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}{% else %}"
            "{{ m.content }}{% endif %}{% endfor %}",
            TWO_ANSWERS,
            "writes no token that counts",
        ),
    ],
)  # fmt: skip
def test_a_chat_whose_answers_are_not_exactly_known_is_refused(template, messages, message):
    texts = ["user: Hi assistant: Hello! Two"] * 30
    with pytest.raises(ChatError, match=f"(?s){message}"):
        write(template, messages, texts=texts)


def test_tools_that_the_template_leaves_out_are_refused():
    with pytest.raises(ChatError, match="ignores the chat's tools"):
        write(SMOLLM, TWO_ANSWERS, tools=[WEATHER])
