"""The requests for texts: a word in one of its senses.

Words are the lemmas of WordNet that the tokenizer has as one token after a space, since only these have senses of their
own, and their senses are the synsets that they belong to.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from dskd.config import CorpusConfig
from dskd.console import progress
from dskd.lexicon.wordnet import WordNet, spelled
from dskd.models.words import MIN_HEAD_LETTERS, tokenize_words
from dskd.random_numbers import derived_seed


@dataclass(frozen=True)
class Sense:
    """A word in one of its senses."""

    word: str
    synset: str  # its name, such as bank.n.01
    part_of_speech: str  # n, v, a, s or r
    gloss: str  # WordNet's definition


@dataclass(frozen=True)
class Request:
    """A text to write."""

    sense: Sense
    number: int  # of the text, among those of its sense

    @property
    def name(self) -> str:
        """The name of the document that the text becomes."""
        return f"{self.sense.word} ({self.sense.synset}) #{self.number}"

    def seed(self, seed: int) -> int:
        """Returns the seed from which the text's tokens are drawn."""
        return derived_seed(seed, "written", self.sense.synset, self.sense.word, self.number)


def find_senses(wordnet: WordNet, tokenizer: Any, vocab_size: int, seed: int) -> list[Sense]:
    """Returns all senses of all words that are one token, in an order that depends only on `seed`."""
    senses: dict[tuple[str, str], Sense] = {}
    for synset in progress(wordnet.reader.all_synsets(), total=None, label="reading WordNet", unit="synsets"):
        for word in map(spelled, synset.lemma_names()):
            if len(word) >= MIN_HEAD_LETTERS and " " not in word:
                senses[word, synset.name()] = Sense(word, synset.name(), synset.pos(), synset.definition())
    words = sorted({word for word, _ in senses})
    tokens = tokenize_words(words, tokenizer, vocab_size)
    are_one_token = {word for word, ids in zip(words, tokens, strict=True) if len(ids) == 1}
    chosen = [sense for sense in senses.values() if sense.word in are_one_token]
    return sorted(chosen, key=lambda sense: _order(seed, sense))


def make_requests(senses: list[Sense], corpus: CorpusConfig) -> list[Request]:
    """Returns the requests for the first `max_senses` senses, `texts_per_sense` of each."""
    return [Request(sense, number) for sense in senses[: corpus.max_senses] for number in range(corpus.texts_per_sense)]


def _order(seed: int, sense: Sense) -> bytes:
    return hashlib.blake2b(f"{seed}:{sense.synset}:{sense.word}".encode(), digest_size=16).digest()
