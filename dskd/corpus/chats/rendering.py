"""Writes chats with a chat template, and finds the tokens of each that count in the loss.

With `corpus.loss_on: assistant` these are the answers: what the assistant says, with the token that ends its turn, and
without the header that begins it. They are the passages between the template's `{% generation %}` marks. A template
without marks writes each chat several times: up to an answer, with the header that asks for it
(`add_generation_prompt`), and up to its end. Both must be beginnings of the whole chat, in text and in tokens, so that
the model learns to continue exactly the prompts that it will be given. If they are not, the chat is refused:
transformers' own mask counts whole tokens that begin or end outside of an answer, and often more
(https://github.com/huggingface/transformers/issues/47325).

Shapes: n tokens of a chat.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dskd.console import warn
from dskd.corpus.chats.left_out import is_note, other_keys, without, without_a_part
from dskd.corpus.chats.special_tokens import SpecialTokens
from dskd.corpus.chats.tool_results import find_misplaced_result
from dskd.corpus.chats.turns import Chat, ChatError, Message
from dskd.corpus.template_options import TEMPLATE_OPTIONS
from dskd.lexicon.reading import is_storable

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REMEDY = "use a chat template with the marks {% generation %} and {% endgeneration %} around answers"
_SHOWN_CHARACTERS = 40
_NEAR_TOKENS = 8  # the end of a turn follows its answer within this many tokens

Passage = tuple[int, int]  # the first character of a part of the text, and the one after its last


@dataclass(frozen=True)
class WrittenChat:
    """A chat as text and as tokens."""

    text: str
    tokens: np.ndarray  # [n] int32
    counted: np.ndarray  # [n] uint8, 1 where the token counts in the loss


class ChatWriter:
    """A writer of chats with the chat template of a tokenizer."""

    def __init__(self, tokenizer: Any, *, answers_only: bool) -> None:
        """Takes a tokenizer that has a chat template. With `answers_only` only answers count, otherwise all tokens."""
        self._tokenizer = tokenizer
        self._answers_only = answers_only
        self._added_tokens = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = special | set(tokenizer.all_special_ids)
        self._special = SpecialTokens(tokenizer)
        self._has_warned = False
        self.left_out: Counter[str] = Counter()  # turns by the key of a note that the template has not written

    def write(self, chat: Chat) -> WrittenChat | None:
        """Returns a chat as text and tokens; None if it has characters that are not text (a NUL or half a surrogate
        pair).

        Raises:
            SpecialTokenError: when the chat says a special token that the template writes, such as that of a turn's
                end.
            ChatError: when the template refuses the chat or leaves out a part of it, or when the tokens of an answer
                cannot be told from those of its prompt.
        """
        text = self._text(chat.messages, chat.tools)
        self._special.require_none_said(chat, self._text)
        self._require_all_written(chat, text)
        if not is_storable(text):  # tokenizers raise an error for half a surrogate pair
            return None
        tokens = self._tokens([text])[0]
        counted = np.ones(len(tokens), np.uint8)
        if self._answers_only:
            counted[:] = 0
            if _MARK.search(self._tokenizer.get_chat_template(tools=chat.tools)):
                places = self._places(text, tokens, self._marked(chat, text))
                for first, stop in places:
                    counted[first:stop] = 1
                self._warn_of_unmarked_end(tokens, counted, places)
            else:
                for first, stop in self._places(text, tokens, self._between_beginnings(chat, text)):
                    counted[first : self._end_of_turn(tokens, first, stop)] = 1
        counted[:1] = 0  # the first token has nothing that predicts it
        if not counted.any():
            raise ChatError("the chat template writes no token that counts in the loss")
        return WrittenChat(text, np.array(tokens, np.int32), counted)

    def _text(self, messages: list[Message], tools: Any, *, asks: bool = False, part: str = "it") -> str:
        """Returns the text of messages; with `asks`, followed by the header that asks for an answer.

        Raises a ChatError that names `part` if the template refuses them.
        """
        try:
            # As a batch of one chat, which may have no messages yet.
            (text,) = self._tokenizer.apply_chat_template(
                [messages], tools=tools, tokenize=False, add_generation_prompt=asks, **TEMPLATE_OPTIONS
            )
        except Exception as error:  # templates can raise any kind of error
            raise ChatError(f"the chat template refuses {part} ({type(error).__name__}: {error})") from None
        return str(text)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # The template writes all special tokens, also the one that begins a text.
        tokens: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return tokens

    def _require_all_written(self, chat: Chat, text: str) -> None:
        """Checks that the template writes all that some templates leave out: tools, the parts of turns that
        :func:`without_a_part` yields, and the calls of results in another order. Counts the notes that it leaves out.
        """
        if chat.tools and not self._differs(chat.messages, None, text):
            raise ChatError("the chat template ignores the chat's tools; use a teacher with a template for tools")
        for index, message in enumerate(chat.messages):
            for part, other in without_a_part(message):
                if not self._differs([*chat.messages[:index], other, *chat.messages[index + 1 :]], chat.tools, text):
                    raise ChatError(
                        f"the chat template leaves out {part} in turn {index + chat.first_number}; use a template that "
                        "writes it, or remove it from the chat"
                    )
        moved = find_misplaced_result(chat.messages, chat.first_number)
        if moved is not None:
            other = {**without(chat.messages[moved], {"name"}), "tool_call_id": ""}
            if not self._differs([*chat.messages[:moved], other, *chat.messages[moved + 1 :]], chat.tools, text):
                raise ChatError(
                    f"turn {moved + chat.first_number} (tool) is not the result of the call in its place, and the chat "
                    "template leaves out tool_call_id and name; put the results in the order of the calls"
                )
        self._count_notes(chat, text)

    def _count_notes(self, chat: Chat, text: str) -> None:
        """Counts the turns with each note that the template leaves out."""
        notes = Counter(key for message in chat.messages for key, value in other_keys(message) if is_note(key, value))
        if not notes:
            return

        def is_left_out(keys: set[str]) -> bool:
            return not self._differs([without(message, keys) for message in chat.messages], chat.tools, text)

        # Each test writes the chat, so test all notes at once first.
        if not is_left_out(set(notes)):
            notes = Counter({key: count for key, count in notes.items() if is_left_out({key})})
        self.left_out += notes

    def _differs(self, messages: list[Message], tools: Any, text: str) -> bool:
        """Returns True if the template writes another text than `text`, or refuses the messages."""
        try:
            return self._text(messages, tools) != text
        except ChatError:
            return True

    def _marked(self, chat: Chat, text: str) -> list[Passage]:
        """Returns the passages between the template's marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        (written,), (passages,) = render_jinja_template(
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=self._tokenizer.get_chat_template(tools=chat.tools),
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **TEMPLATE_OPTIONS},
        )
        if written != text:
            raise ChatError("the chat template renders the chat differently each time")
        # transformers loses marks in macros and at the very beginning of a text. So search each answer in its passage.
        inside, at = "\n".join(text[first:stop] for first, stop in passages), 0
        for index in chat.answers():
            answer = chat.messages[index]["content"].strip()
            begin = inside.find(answer, at)
            if begin >= 0:
                at = begin + len(answer)
            elif answer in text:
                raise ChatError(
                    f"the marks {{% generation %}} of the chat template do not contain all of the answer in turn "
                    f"{index + chat.first_number}; every answer needs to be between marks, outside of macros"
                )
        return [passage for passage in passages if passage[0] < passage[1]]

    def _warn_of_unmarked_end(self, tokens: list[int], counted: np.ndarray, places: list[tuple[int, int]]) -> None:
        """Warns, once, if the special token that ends an answer's turn is not between the template's marks."""
        if self._has_warned:
            return
        for first, stop in places:
            last = self._first_visible(tokens, range(stop - 1, first - 1, -1))
            following = self._first_visible(tokens, range(stop, min(stop + _NEAR_TOKENS, len(tokens))))
            if following is None or counted[following] or tokens[following] not in self._special_ids:
                continue
            if last is None or tokens[last] not in self._special_ids:
                self._has_warned = True
                warn(
                    f"the marks {{% generation %}} of the chat template do not contain "
                    f"{self._tokenizer.decode([tokens[following]])!r}, which follows an answer, so the student does "
                    "not learn to end its turn; put {% endgeneration %} after that token"
                )
                return

    def _first_visible(self, tokens: list[int], places: range) -> int | None:
        """Returns the first of these places whose token is not white space; None if there is none."""
        return next((index for index in places if self._tokenizer.decode([tokens[index]]).strip()), None)

    def _between_beginnings(self, chat: Chat, text: str) -> list[Passage]:
        """Returns the passage of each answer, by writing the chat up to it and up to its end."""
        passages = []
        for index in chat.answers():
            number = index + chat.first_number
            before = f"the turns before turn {number}"
            try:
                prompt = self._text(chat.messages[:index], chat.tools, asks=True, part=before)
                _require_beginning(prompt, text, f"{before}, with the header that asks for an answer,")
            except ChatError:
                if index > 0:
                    raise
                raise ChatError(
                    "the chat begins with the assistant, and the chat template writes no prompt for that; remove "
                    f"turn {number}"
                ) from None
            up_to = f"the turns up to turn {number}"
            is_last = index + 1 == len(chat.messages)
            whole = text if is_last else self._text(chat.messages[: index + 1], chat.tools, part=up_to)
            if not text.startswith(whole):
                # Some templates end a whole chat with one more token.
                whole = whole.removesuffix(self._tokenizer.eos_token or "")
            _require_beginning(whole, text, up_to)
            answer, rest = chat.messages[index]["content"].strip(), whole[len(prompt) :].lstrip()
            if not rest.startswith(answer) and prompt == self._text(chat.messages[:index], chat.tools, part=before):
                # Nothing asks for an answer, so a header of its own would count as a part of it.
                raise ChatError(
                    f"the chat template ignores add_generation_prompt, but writes {rest[:_SHOWN_CHARACTERS]!r} for "
                    f"turn {number}, so it is unknown where the answer begins; {_REMEDY}"
                )
            passages.append((len(prompt), len(whole)))
        return passages

    def _places(self, text: str, tokens: list[int], passages: Sequence[Passage]) -> list[tuple[int, int]]:
        """Returns the first token of each passage, and the one after its last.

        Raises a ChatError if a token is in part inside of a passage, or if the text up to there has other tokens.
        """
        cuts = [cut for passage in passages for cut in passage]
        if not cuts:
            return []
        pieces = self._tokens([text[first:stop] for first, stop in itertools.pairwise([0, *cuts, len(text)])])
        if list(itertools.chain(*pieces)) == tokens:
            places = list(itertools.accumulate(map(len, pieces[:-1])))
        else:
            # Some tokenizers begin every text with a space, so that pieces have other tokens, but beginnings have not.
            beginnings = self._tokens([text[:cut] for cut in cuts])
            for cut, beginning in zip(cuts, beginnings, strict=True):
                if tokens[: len(beginning)] != beginning:
                    around = f"{text[max(0, cut - 20) : cut]!r} and {text[cut : cut + 20]!r}"
                    raise ChatError(
                        f"between {around} the chat is tokenized differently from the part before it, so an answer and "
                        "its prompt cannot be told apart in tokens; remove white space at the beginning of the answer, "
                        "or use a chat template with a special token before answers"
                    )
            places = list(map(len, beginnings))
        return list(zip(places[::2], places[1::2], strict=True))

    def _end_of_turn(self, tokens: list[int], first: int, stop: int) -> int:
        """Returns the end of an answer without white space after the special token that ends its turn, if one does."""
        last = max((index for index in range(first, stop) if tokens[index] in self._added_tokens), default=None)
        if last is None or self._tokenizer.decode(tokens[last + 1 : stop]).strip():
            return stop
        return last + 1


def _require_beginning(beginning: str, text: str, part: str) -> None:
    if text.startswith(beginning):
        return
    differences = (at for at, (one, other) in enumerate(zip(beginning, text, strict=False)) if one != other)
    at = next(differences, min(len(beginning), len(text)))
    alone, in_chat = (repr(each[max(0, at - 10) :][:_SHOWN_CHARACTERS]) for each in (beginning, text))
    raise ChatError(
        f"the chat template writes {part} differently by themselves ({alone}) and in the chat ({in_chat}), so the "
        f"prompt of this answer is unknown; {_REMEDY}"
    )
