"""Text and relations from WordNet's dictionary files (wndb(5WN)) without nltk, which takes half a minute for them."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

PARTS_OF_SPEECH = {"a": "adj", "r": "adv", "n": "noun", "v": "verb"}


@dataclass(frozen=True)
class Synset:
    """A synset as its line of a data file has it."""

    name: str  # as nltk calls it: first lemma, part of speech and number of the sense
    words: list[str]
    antonyms: list[tuple[int, tuple[str, str], int]]  # number of the word, place of the other synset, number there
    gloss: str

    @property
    def text(self) -> str:
        """Its words, its definition and its examples, as sentences."""
        definition = re.sub(r'".*?"', "", self.gloss).strip().strip("; ")
        sentences = [f"{', '.join(self.words)}: {definition}", *re.findall(r'"([^"]*)"', self.gloss)]
        return " ".join(sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences)


def read_synsets(folder: Path) -> dict[tuple[str, str], Synset]:
    """Returns {(part of speech, offset): synset} of a folder with WordNet's dictionary files."""
    return {place: synset for part in PARTS_OF_SPEECH for place, synset in _read_part(folder, part)}


def _read_part(folder: Path, part: str) -> Iterator[tuple[tuple[str, str], Synset]]:
    offsets = {}
    for line in _lines(folder / f"index.{PARTS_OF_SPEECH[part]}"):
        lemma, _, count, *others = line.split()
        offsets[lemma] = others[-int(count) :]
    lines = [line.split("|") for line in _lines(folder / f"data.{PARTS_OF_SPEECH[part]}")]
    satellites = {offset for offset, _, kind, *_ in (columns.split() for columns, _ in lines) if kind == "s"}
    for columns, gloss in lines:
        offset, _, kind, count, *others = columns.split()
        end = 2 * int(count, 16)
        lemmas = [re.sub(r"\([^()]*\)$", "", lemma) for lemma in others[:end:2]]
        pointers = others[end + 1 : end + 1 + 4 * int(others[end])]
        antonyms = [
            (int(numbers[:2], 16) - 1, (to, place), int(numbers[2:], 16) - 1)
            for symbol, place, to, numbers in zip(*(pointers[start::4] for start in range(4)), strict=True)
            if symbol == "!"
        ]
        first = lemmas[0].lower()
        senses = [place for place in offsets[first] if kind != "s" or place in satellites]  # which count by themselves
        name = f"{first}.{kind}.{senses.index(offset) + 1:02d}"
        yield (part, offset), Synset(name, [lemma.replace("_", " ") for lemma in lemmas], antonyms, gloss.strip())


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as stream:
        yield from (line for line in stream if not line.startswith("  "))


def some_texts(synsets: dict[tuple[str, str], Synset], count: int) -> list[str]:
    """Returns the texts of `count` synsets, with parts of speech mixed."""

    def place(synset: Synset) -> bytes:
        return hashlib.blake2b(f"order:{synset.name}".encode(), digest_size=8).digest()

    return [synset.text for synset in sorted(synsets.values(), key=place)[:count]]


def pairs(
    synsets: dict[tuple[str, str], Synset], places: Iterable[tuple[str, str]] | None = None
) -> Iterator[tuple[str, str, str]]:
    """Yields (word, word, "synonym" or "antonym"): all words of each synset, and direct antonyms.

    With `places`, only those of the synsets there.
    """
    for place in synsets if places is None else places:
        synset = synsets[place]
        yield from ((one, other, "synonym") for one, other in permutations(synset.words, 2))
        for number, other, number_there in synset.antonyms:
            yield synset.words[number], synsets[other].words[number_there], "antonym"
