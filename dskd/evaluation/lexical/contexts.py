"""Words in WordNet's example sentences, each with the sense that the example illustrates.

An example belongs to a synset. It counts for a lemma of this synset that occurs in it exactly once, as it is or in a
form that WordNet's own morphology (morphy) reduces to it. A word must precede it, because a decoder's state at the
first word of a text holds nothing about the word's sense.

A context's synonyms are the synset's other lemmas; an adjective also has the lemmas of similar synsets. Its antonyms
are the direct antonyms of the lemma in the synset; an adjective also has those of similar synsets, which are WordNet's
indirect antonyms, as in :mod:`dskd.lexicon.wordnet_relations`. A word that is both counts as neither.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dskd.console import progress
from dskd.lexicon.wordnet import WordNet, spelled

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_SATELLITE, _ADJECTIVE = "s", "a"


@dataclass(frozen=True)
class Context:
    """An example sentence of a synset, and the position of one of the synset's lemmas in it."""

    lemma: str  # as it is spelled, with spaces
    part_of_speech: str  # n, v, a, r
    synset: str  # such as bank.n.01
    text: str
    start: int  # text[start:stop] is the word
    stop: int
    synonyms: tuple[str, ...] = ()
    antonyms: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """The word as the text has it, perhaps inflected."""
        return self.text[self.start : self.stop]

    @property
    def cluster(self) -> str:
        """Lemma and part of speech. Items that share them are not independent."""
        return f"{self.lemma}.{self.part_of_speech}"


def read_contexts(wordnet: WordNet) -> list[Context]:
    """Returns all contexts in WordNet, sorted."""
    contexts: set[Context] = set()
    for synset in progress(wordnet.reader.all_synsets(), total=None, label="reading examples", unit="synsets"):
        for text in synset.examples():
            contexts.update(_contexts_of(wordnet, synset, text))
    return sorted(contexts, key=lambda c: (c.lemma, c.part_of_speech, c.synset, c.text))


def _contexts_of(wordnet: WordNet, synset: Any, text: str) -> Iterator[Context]:
    part = _ADJECTIVE if synset.pos() == _SATELLITE else synset.pos()
    similar = [lemma for other in synset.similar_tos() for lemma in other.lemmas()]
    for lemma in synset.lemmas():
        word = spelled(lemma.name())
        spans = _spans(wordnet, word, part, text)
        if len(spans) != 1 or not _WORD.search(text, 0, spans[0][0]):
            continue
        synonyms = {spelled(other.name()) for other in (*synset.lemmas(), *similar)} - {word}
        antonyms = {spelled(antonym.name()) for other in (lemma, *similar) for antonym in other.antonyms()} - {word}
        yield Context(
            word.lower(),
            part,
            synset.name(),
            text,
            *spans[0],
            synonyms=tuple(sorted(synonyms - antonyms)),
            antonyms=tuple(sorted(antonyms - synonyms)),
        )


def _spans(wordnet: WordNet, word: str, part: str, text: str) -> list[tuple[int, int]]:
    if not _WORD.fullmatch(word):  # a lemma of several words is not inflected
        return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)]
    lemma = word.lower()
    return [
        match.span()
        for match in _WORD.finditer(text)
        if (form := match.group().lower()) == lemma
        or (form[:1] == lemma[:1] and wordnet.reader.morphy(form, part) == lemma)
    ]
