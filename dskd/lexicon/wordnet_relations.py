"""Reads WordNet's synonyms and antonyms, in English and in the languages of Open Multilingual WordNet."""

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from dskd.console import progress
from dskd.lexicon.languages import open_language
from dskd.lexicon.reading import Report
from dskd.lexicon.relations import Relation
from dskd.lexicon.wordnet import WordNet, spelled

SOURCE = "wordnet"
INDIRECT_SOURCE = "wordnet-indirect"
ENGLISH = "eng"
GAPS = "gaps of Open Multilingual WordNet"
# Marks that some languages have in place of a lemma if they lack a word for the synset.
_GAPS = frozenset(("GAP!", "PSEUDOGAP!"))
# Languages whose lemmas have a + between a word and its ending, as 友善+的 (friendly), or before a word.
_JOINED_LANGUAGES = frozenset(("cmn", "nno", "slk"))
_JOINT = re.compile(r"^\++(?=\w)|(?<=\w)\+(?=\w)")


def read_wordnet(wordnet: WordNet) -> Iterator[Relation]:
    """Yields the synonyms among the lemmas of each synset, and the direct antonyms.

    Underscores in lemmas of several words become spaces.
    """
    for synset in _synsets(wordnet, "reading WordNet"):
        lemmas = synset.lemmas()
        words = [spelled(lemma.name()) for lemma in lemmas]
        yield from _synonyms(words, SOURCE)
        for lemma, head in zip(lemmas, words, strict=True):
            for antonym in lemma.antonyms():
                yield Relation(head, spelled(antonym.name()), "antonym", SOURCE)


def read_indirect_antonyms(wordnet: WordNet) -> Iterator[Relation]:
    """Yields the indirect antonyms of adjectives, which follow from WordNet's `similar to`.

    WordNet groups adjectives around heads: satellites are similar to a head, and only heads have antonyms of their own.
    Here, every lemma of a satellite is an antonym of every direct antonym of any lemma of the heads that it is similar
    to. For example, hot and cold are direct antonyms and scorching is similar to hot, so scorching and cold are
    indirect antonyms. Read backwards, the same rule holds for heads: the indirect antonyms of cold are the satellites
    of hot. Satellites of opposite heads are not related to each other. Pairs that are direct antonyms or synonyms in
    any sense are left out, so that the weaker source does not cost the stronger one a pair.
    """
    heads = {
        synset: [spelled(antonym.name()) for lemma in synset.lemmas() for antonym in lemma.antonyms()]
        for synset in wordnet.reader.all_synsets("a")
        if synset.pos() == "a"
    }
    direct = {frozenset((relation.head, relation.tail)) for relation in read_wordnet(wordnet)}
    for satellite in _synsets(wordnet, "reading indirect antonyms", "s"):
        if satellite.pos() != "s":
            continue
        antonyms = dict.fromkeys(word for head in satellite.similar_tos() for word in heads.get(head, ()))
        for name in satellite.lemma_names():
            head = spelled(name)
            for tail in antonyms:
                if frozenset((head, tail)) not in direct:
                    yield Relation(head, tail, "antonym", INDIRECT_SOURCE)


def read_other_language(wordnet: WordNet, code: str, report: Report) -> Iterator[Relation]:
    """Yields the synonyms and antonyms of another language, from its lemmas in Open Multilingual WordNet.

    Lemmas of one synset are synonyms. Open Multilingual WordNet has no antonyms, so they are inferred from English: the
    lemmas of two synsets are antonyms if English lemmas of these synsets are direct antonyms. Marks of lexical gaps are
    not lemmas; they are dropped and counted.

    Raises:
        UserError: when Open Multilingual WordNet is missing, or lacks the language.
    """
    source = f"{SOURCE}:{code}"
    open_language(wordnet, code, report)
    for synset in _synsets(wordnet, f"reading WordNet ({code})"):
        words = _words(synset, code)
        report.dropped[GAPS] += any(name in _GAPS for name in synset.lemma_names(code))
        if not words:
            continue
        yield from _synonyms(words, source)
        opposites = dict.fromkeys(antonym.synset() for lemma in synset.lemmas() for antonym in lemma.antonyms())
        for opposite in opposites:
            for tail in _words(opposite, code):
                for head in words:
                    yield Relation(head, tail, "antonym", source)


def _synsets(wordnet: WordNet, label: str, part_of_speech: str | None = None) -> Iterator[Any]:
    return progress(wordnet.reader.all_synsets(part_of_speech), total=None, label=label, unit="synsets")


def _synonyms(words: list[str], source: str) -> Iterator[Relation]:
    for head, tail in permutations(words, 2):
        if head != tail:
            yield Relation(head, tail, "synonym", source)


def _words(synset: Any, code: str) -> list[str]:
    names = (name.replace("_", " ").strip() for name in synset.lemma_names(code) if name not in _GAPS)
    if code in _JOINED_LANGUAGES:
        names = (_JOINT.sub("", name) for name in names)
    return list(dict.fromkeys(filter(None, names)))
