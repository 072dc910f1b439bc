"""Phrases in the training text of a config: how often they occur, and which sentences are new.

All of `WORKDIR/corpus/train.parquet` is read, not only the part that fills sequences, because a teacher from scratch is
trained on all of it. Words are compared in lower case, and spaces and punctuation are ignored, so that neither a
tokenizer nor a full stop makes a difference. Phrases are looked up by a rolling hash of 64 bits over arrays of word
numbers.
"""

import re
from collections.abc import Iterable

import numpy as np

from dskd.corpus.packing import batched
from dskd.random_numbers import derived_seed

# A sentence is known if the training text has this many of its words in a row. WordNet's examples have seven.
RUN_WORDS = 8
_WORDS = re.compile(r"\w+(?:['’]\w+)*")
Phrase = tuple[str, ...]


def words_of(text: str) -> Phrase:
    """Returns the words of a text in lower case."""
    return tuple(_WORDS.findall(text.lower()))


def count_phrases(texts: Iterable[str], phrases: Iterable[Phrase]) -> dict[Phrase, int]:
    """Counts how often each phrase of one or more words occurs in the texts, never across two texts."""
    distinct = sorted({phrase for phrase in phrases if phrase})
    # Only words of phrases have a number from 1 and a random odd code; every other word is 0.
    numbers = {word: number for number, word in enumerate(sorted({w for phrase in distinct for w in phrase}), start=1)}
    codes = np.array([0, *(2 * derived_seed(0, "word", word) + 1 for word in numbers)], dtype=np.uint64)
    by_length: dict[int, list[Phrase]] = {}
    for phrase in distinct:
        by_length.setdefault(len(phrase), []).append(phrase)
    # Phrases of one length share a sorted array of hashes; `indices` is the index of each phrase's hash in it.
    hashes, indices, counts = {}, {}, {}
    for length, same in by_length.items():
        values = np.concatenate([_hashes(np.array([numbers[w] for w in p]), length, codes) for p in same])
        hashes[length], indices[length] = np.unique(values, return_inverse=True)
        counts[length] = np.zeros(len(hashes[length]), dtype=np.int64)
    # A "" after each text becomes a 0, so that no run crosses into the next text.
    for batch in batched(texts):
        words = (word for text in batch for word in (*words_of(text), ""))
        words_of_batch = np.fromiter((numbers.get(word, 0) for word in words), dtype=np.int64)
        for length, known in hashes.items():
            values = _hashes(words_of_batch, length, codes)
            index = np.searchsorted(known, values).clip(max=len(known) - 1)
            counts[length] += np.bincount(index[known[index] == values], minlength=len(known))
    return {
        phrase: int(counts[length][index])
        for length, same in by_length.items()
        for phrase, index in zip(same, indices[length], strict=True)
    }


def runs_of(text: str) -> list[Phrase]:
    """Returns every run of `RUN_WORDS` words of a sentence; for a shorter sentence, all its words as one run."""
    words = words_of(text)
    last = max(0, len(words) - RUN_WORDS)
    return [words[start : start + RUN_WORDS] for start in range(last + 1)]


def is_new(text: str, counts: dict[Phrase, int]) -> bool:
    """Returns True if the training text has none of this sentence's runs; `counts` has those of :func:`runs_of`."""
    return not any(counts.get(run, 0) for run in runs_of(text))


def _hashes(numbers: np.ndarray, length: int, codes: np.ndarray) -> np.ndarray:
    """Returns a hash [n - length + 1] uint64 of every run of `length` words.

    A run that contains a 0, a word of no phrase, gets hash 0, which no phrase has.
    """
    size = max(0, len(numbers) - length + 1)
    values = np.zeros(size, dtype=np.uint64)
    known = np.ones(size, dtype=bool)
    for index in range(length):
        part = numbers[index : index + size]
        # A polynomial modulo 2^64. Its odd multiplier is invertible, and the shift carries high bits to low ones.
        values = values * np.uint64(0x9E3779B97F4A7C15) + codes[part]
        values ^= values >> np.uint64(29)
        known &= part > 0
    return np.where(known, values, np.uint64(0))
