"""Entries of the sense dictionary: their tokens, their rows, and the entries they are related to."""

from collections.abc import Sequence

from dskd.senses.dictionary import SenseDictionary
from dskd.senses.entries import Entries


def tokens_of_entry(entries: Entries, number: int) -> list[int]:
    """The token ids of an entry: one for a token, two or three for a span."""
    if number < entries.vocab_size:
        return [number]
    return [token for token in entries.span_tokens[number - entries.vocab_size].tolist() if token >= 0]


def entry_of_tokens(entries: Entries, tokens: Sequence[int]) -> int | None:
    """The entry that has just these tokens; None where there is none."""
    if len(tokens) == 1:
        return tokens[0]
    width = entries.span_tokens.shape[1]
    if not 1 < len(tokens) <= width or not len(entries.span_tokens):
        return None
    wanted = entries.span_tokens.new_tensor([*tokens, *[-1] * (width - len(tokens))])
    found = (entries.span_tokens == wanted).all(-1).nonzero()
    return entries.vocab_size + int(found[0]) if len(found) else None


def rows_of_entry(dictionary: SenseDictionary, entry: int) -> range:
    """The rows of an entry."""
    return range(int(dictionary.entry_offsets[entry]), int(dictionary.entry_offsets[entry + 1]))


def rows_of_tokens(dictionary: SenseDictionary, tokens: Sequence[int]) -> range:
    """The rows of the entry with these tokens; empty where there is no such entry, or it has no sense."""
    entry = entry_of_tokens(dictionary.entries, tokens)
    return range(0) if entry is None else rows_of_entry(dictionary, entry)


def neighbours_of(entries: Entries, token: int, relation: str) -> list[int]:
    """The entries that are synonyms or antonyms of a token."""
    offsets, tails = getattr(entries, f"{relation}_offsets"), getattr(entries, f"{relation}_entries")
    return tails[int(offsets[token]) : int(offsets[token + 1])].tolist()
