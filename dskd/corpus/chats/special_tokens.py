"""Finds special tokens in what chats say: a tokenizer does not tell them from those that the chat template writes.

If a user asks what `<|im_end|>` means, the tokens of the chat have the end of a turn in the middle of the question; in
an answer, that token would even count, so the student would learn to stop there and to continue with turns of its own.
A chat may have special tokens that mean nothing to the template, such as those of its thoughts.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from dskd.corpus.chats.turns import Chat, ChatError, Message

_NEUTRAL = "x"


class SpecialTokenError(ChatError):
    """The error that is raised when what a chat says contains a special token, with its place."""


class SpecialTokens:
    """The special tokens of a tokenizer, as texts."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes the tokenizer of the chat template."""
        # Those with a name, such as the end-of-text token and the unknown token, mean something in any template.
        self._named = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts = sorted(filter(None, self._named | added), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def require_none_said(self, chat: Chat, write: Callable[[list[Message], Any], str]) -> None:
        """Checks that a chat says no special token that has a name, or that the template itself writes.

        `write` returns the text of messages and tools.

        Raises:
            SpecialTokenError: when it says one, with the token and its place.
        """
        parts = [(f"turn {number}", message) for number, message in enumerate(chat.messages, chat.first_number)]
        tokens = [
            (part, token)
            for part, value in [*parts, ("its tools", chat.tools)]
            for text in _texts(value)
            for token in self._pattern.findall(text)
        ]
        if not tokens:
            return
        try:
            written = write(self._without(chat.messages), self._without(chat.tools))
        except ChatError:  # nothing says which of them the template writes
            written = "".join(token for _, token in tokens)
        for part, token in tokens:
            if token in self._named or token in written:
                raise SpecialTokenError(f"{part}: {token!r}")

    def _without(self, value: Any) -> Any:
        """Returns messages or tools with other text in place of special tokens."""
        if isinstance(value, dict):
            return {key: each if key == "role" else self._without(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._without(each) for each in value]
        return self._pattern.sub(_NEUTRAL, value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts in messages or tools, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value
