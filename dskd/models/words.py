"""The tokens of words, as they are inside a text and in other forms.

A word counts only if its tokens decode to that word, contain no special token, such as the unknown token, and are
tokens of the model: a tokenizer can have more. Otherwise one token would collect the relations of all words that the
tokenizer does not know, and a token that the model lacks would be taken for a span, whose entry has its number.
"""

import unicodedata
from typing import Any

MIN_HEAD_LETTERS = 3  # of a word whose senses and relations count


def tokenize_words(words: list[str], tokenizer: Any, vocab_size: int | None = None) -> list[tuple[int, ...]]:
    """Returns the token ids of each word as they are inside a text, after a space: " word".

    It tokenizes "the word" and removes the tokens of "the". Tokenizing " word" alone would give other ids with
    tokenizers that add a space of their own at the beginning of a text. A word that the tokenizer does not know gets
    no ids, and so does one with an id that is not below `vocab_size`, which the model does not know.
    """
    if not words:
        return []
    before = "the"
    prefix = tokenizer(before, add_special_tokens=False)["input_ids"]
    batch = tokenizer([f"{before} {word}" for word in words], add_special_tokens=False)["input_ids"]
    tokens = [tuple(ids[len(prefix) :]) if ids[: len(prefix)] == prefix else () for ids in batch]
    return _tokens_of_known_words(words, tokens, tokenizer, vocab_size)


def tokenize_form(
    words: list[str], form: str, tokenizer: Any, vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Returns {word: its token} for the words that are one token in a surface form (see
    :func:`dskd.senses.entries.build_entries`).
    """
    capitalized = {word: upper + word[1:] for word in words if word[0].islower() and len(upper := word[0].upper()) == 1}
    if not capitalized:
        return {}
    texts = list(capitalized.values())
    if form == "sentence_initial":
        batch = [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        tokens = _tokens_of_known_words(texts, batch, tokenizer, vocab_size)
    else:
        tokens = tokenize_words(texts, tokenizer, vocab_size)
    return {word: ids for word, ids in zip(capitalized, tokens, strict=True) if len(ids) == 1}


def _tokens_of_known_words(
    words: list[str], tokens: list[tuple[int, ...]], tokenizer: Any, vocab_size: int | None
) -> list[tuple[int, ...]]:
    """Returns the tokens of each word, or no tokens if they do not represent the word.

    They do not if one of them is a special token or none of the model's, or if they decode to other text. The latter
    happens with tokenizers that drop case, accents, or characters that they do not know.
    """
    special = {*tokenizer.all_special_ids, *(i for i, added in tokenizer.added_tokens_decoder.items() if added.special)}

    def known(ids: tuple[int, ...]) -> bool:
        return vocab_size is None or max(ids, default=0) < vocab_size

    texts = tokenizer.batch_decode([list(ids) for ids in tokens], clean_up_tokenization_spaces=False)
    return [
        ids if special.isdisjoint(ids) and known(ids) and _comparable(word) == _comparable(text) else ()
        for word, ids, text in zip(words, tokens, texts, strict=True)
    ]


def _comparable(text: str) -> str:
    # Decoders add or remove spaces between pieces, and some leave sentencepiece's sign for a space. Tokenizers
    # normalise full-width letters and composed accents; it is still the same word.
    return "".join(unicodedata.normalize("NFKC", text).replace("▁", " ").split())
