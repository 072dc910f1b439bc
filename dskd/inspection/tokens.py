"""Rendering tokens and spans as readable text."""

from collections.abc import Sequence
from typing import Any

from dskd.models.words import MIN_HEAD_LETTERS, tokenize_words
from dskd.senses.entries import Entries

_BEFORE = "the"


def token_texts(tokenizer: Any, pieces: Sequence[Sequence[int]]) -> list[str]:
    """Returns the text of each piece (token ids) as it reads after another word: with a space if it starts a word.

    Decoding a piece by itself would lose that space with tokenizers that drop a space at the beginning of a text.
    """
    prefix = tokenizer(_BEFORE, add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(prefix, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*prefix, *piece] for piece in pieces], clean_up_tokenization_spaces=False)
    return [text[len(before) :] for text in texts]


def readable(text: str) -> str:
    """Formats a piece of text for a list.

    A piece that starts a word loses its space, any other piece gets a "…" in front, and signs alone are put in quotes.
    """
    if not any(letter.isalnum() for letter in text):
        return repr(text)
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return shown[1:] if shown.startswith(" ") else f"…{shown}"


def entry_texts(entries: Entries, numbers: Sequence[int], tokenizer: Any) -> list[str]:
    """Returns entries of the sense dictionary, tokens and spans, as readable text."""
    return [readable(text) for text in token_texts(tokenizer, [entries.tokens_of(n) for n in numbers])]


def whole_words(tokenizer: Any, vocab_size: int) -> dict[int, str]:
    """Returns the tokens that are whole words: " word" of letters only, long enough to be a head."""
    tokens = range(min(vocab_size, len(tokenizer)))
    texts = token_texts(tokenizer, [[token] for token in tokens])
    words = {
        token: text[1:]
        for token, text in zip(tokens, texts, strict=True)
        if text.startswith(" ") and text[1:].isalpha() and len(text) > MIN_HEAD_LETTERS
    }
    # Several tokens can have the same text; keep the one that the tokenizer produces for it.
    back = tokenize_words(list(words.values()), tokenizer)
    return {token: word for (token, word), ids in zip(words.items(), back, strict=True) if ids == (token,)}
