"""Tokenizing texts, including texts that are too long to tokenize at once.

A tokenizer needs a few hundred bytes of memory per token, and returns nothing until it has read all of a text. A long
text is therefore tokenized in pieces. It is cut only where the tokens around the cut are the same as in the uncut text.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dskd.errors import UserError

PIECE_CHARACTERS = 1_000_000
_PIECES_AT_ONCE = 4  # a fast tokenizer processes them in parallel
_AROUND = 400  # characters on each side of a cut whose tokens are compared
_TRIES = 40  # places to try for a cut at spaces, and again at any characters


class Tokenizing:
    """A tokenizer for whole documents: texts to tokens [n] int32, each ending with the end-of-text token."""

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Takes a Hugging Face tokenizer; if `vocab_size` is given, token ids from it up are refused."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        separator = text_end(tokenizer)
        self.end = [] if separator is None else [separator]

    def read(
        self, texts: list[str], advance: Callable[[int], object], name_of: Callable[[int], str], enough: int | None
    ) -> list[np.ndarray]:
        """Tokenizes texts. If `enough` is given, a long text is only tokenized until it has that many tokens.

        Args:
            texts: documents.
            advance: called with the number of new tokens whenever there are some.
            name_of: returns the name of a text, from its index in `texts`, for messages.
            enough: the most tokens that the caller needs.

        Raises:
            UserError: when a text has a token that the model does not have.
        """
        short = [number for number, text in enumerate(texts) if len(text) <= PIECE_CHARACTERS]
        ids = self._ids([texts[number] for number in short], special=True)
        documents: dict[int, np.ndarray] = dict(zip(short, map(self._ended, ids), strict=True))
        advance(sum(map(len, documents.values())))
        for number, text in enumerate(texts):
            if number not in documents:
                documents[number] = self._read_long(text, advance, enough)
            if self._vocab_size is not None and len(documents[number]):
                largest = [int(documents[number].max())]
                require_known(largest, self._vocab_size, self._tokenizer, name_of(number))
        return [documents[number] for number in range(len(texts))]

    def _read_long(self, text: str, advance: Callable[[int], object], enough: int | None) -> np.ndarray:
        added = self._added()
        if added is None:
            (ids,) = self._ids([text], special=True)
            advance(len(ids))
            return self._ended(ids)
        parts = [np.array(added[0], np.int32)]
        count = 0
        for pieces in _batched(self._pieces(text)):
            for ids in self._ids(pieces, special=False):
                parts.append(np.array(ids, np.int32))
                count += len(ids)
                advance(len(ids))
            if enough is not None and count >= enough:
                return np.concatenate(parts)
        return np.concatenate([*parts, self._ended(added[1])])

    def _ended(self, ids: list[int]) -> np.ndarray:
        return np.array(ids if ids[-1:] == self.end else [*ids, *self.end], np.int32)

    def _ids(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _added(self) -> tuple[list[int], list[int]] | None:
        """Returns the tokens that the tokenizer adds before and after every text; None if they cannot be determined."""
        (whole,), (bare,) = self._ids(["a"], special=True), self._ids(["a"], special=False)
        for at in range(len(whole) - len(bare) + 1):
            if whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        return None

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        target = PIECE_CHARACTERS
        while target < len(text):
            cut = self._cut(text, start, target)
            target += PIECE_CHARACTERS
            if cut is not None:
                stop, next_start = cut
                yield text[start:stop]
                start, target = next_start, next_start + PIECE_CHARACTERS
        yield text[start:]

    def _cut(self, text: str, start: int, target: int) -> tuple[int, int] | None:
        """Returns where a piece ends and where the next one starts; None if every cut near `target` changes tokens."""
        for cut in _places(text, start, target):
            left, right = text[max(start, cut - _AROUND) : cut], text[cut : cut + _AROUND]
            whole, head, tail = self._ids([left + right, left, right], special=False)
            if whole == head + tail:
                return cut, cut
            # Some tokenizers add a space before every text, which replaces the space at the cut.
            if right[0] == " " and whole == head + self._ids([right[1:]], special=False)[0]:
                return cut, cut + 1
        return None


def require_known(tokens: Sequence[int], vocab_size: int | None, tokenizer: Any, text_name: str) -> None:
    """Checks that a model has all tokens of a text; anything passes if `vocab_size` is None.

    Args:
        tokens: token ids.
        vocab_size: number of tokens of the model.
        tokenizer: the tokenizer that made them.
        text_name: what the text is, for the message.

    Raises:
        UserError: for a token whose id is not below `vocab_size`.
    """
    if vocab_size is None or not len(tokens) or (largest := int(max(tokens))) < vocab_size:
        return
    raise UserError(
        f"{text_name}: it has the token {tokenizer.convert_ids_to_tokens(largest)!r}, whose id is {largest}, but the "
        f"model has {vocab_size} tokens (vocab_size), 0 to {vocab_size - 1}; use the tokenizer that belongs to the "
        "model, give the model more embeddings (model.resize_token_embeddings(len(tokenizer))), or remove the token "
        "from the text",
    )


def has_more_tokens(tokenizer: Any, vocab_size: int | None) -> bool:
    """Returns True if a tokenizer has a token whose id is not below `vocab_size`."""
    return vocab_size is not None and max(tokenizer.get_vocab().values(), default=0) >= vocab_size


def text_end(tokenizer: Any) -> int | None:
    """Returns the token that ends a text: the end-of-text token, or the beginning-of-text token if there is none.

    Returns None if the tokenizer has neither.
    """
    return next((i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), None)


def answer_end(tokenizer: Any) -> int | None:
    """Returns the special token that follows an answer in the chat template; None if there is none."""
    if not tokenizer.chat_template:
        return None
    answer = "dskdanswer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program of the model's makers, which may raise anything
        return None
    after = str(rendered).rpartition(answer)[2].lstrip()
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    following = [token for token in special if after.startswith(token)]
    return special[max(following, key=len)] if following else None


def _places(text: str, start: int, target: int) -> Iterator[int]:
    """Yields places to cut at, at or before `target`: first spaces, where most tokenizers begin a word, then any."""
    lowest = max(start + 1, target - PIECE_CHARACTERS // 2)
    space = target
    for _ in range(_TRIES):
        space = text.rfind(" ", lowest, space)
        if space < 0:
            break
        if not text[space - 1].isspace() and text[space + 1 : space + 2].isalnum():
            yield space
    yield from range(target, max(lowest, target - _TRIES), -1)


def _batched(pieces: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        yield batch
