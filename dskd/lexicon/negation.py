"""Negation polarity (docs/method.md, section 1): a word with a negating affix counts as its base with polarity -1.

*Which affix.* The prefix that begins the word, or the suffix that ends it, when it is one of the negating ones; where
both are, the prefix is tried first. An affix further inside negates a part of the word, not the word.

*Which base.* The word without the affix's letters, when that is a known word (one of MorphoLEX, or of the relations);
otherwise, when the negating affix is the only affix, the root, when that is one (penniless, penni, penny). A word
without a known base is left as it is. Words are compared in lower case; a base is spelled as the relations spell it
(un-American, American).

*Chains and cycles.* A base may be negated itself: it is followed to the end, and polarities are multiplied. A chain
that comes back to itself is a cycle: the words on it keep themselves, with polarity 1, and words that lead into it end
where they reach it.

*Pairs.* Each negated word is replaced by its base. When the polarities of the two words multiply to -1, synonym becomes
antonym and antonym becomes synonym: a flip. (happy, unhappy, antonym) becomes (happy, happy, synonym): a self-pair.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.lexicon.morpholex import Segmentation
from dskd.lexicon.relations import RELATIONS, Relation

NEGATING_PREFIXES = frozenset(("un", "dis", "non", "in", "im", "il", "ir", "anti", "de", "a", "an"))
NEGATING_SUFFIXES = frozenset(("less", "free"))
FLIPS_FILE, BASES_FILE = "flips.parquet", "bases.parquet"
FLIPS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("head", "tail", "relation", "source", "head_base", "tail_base", "new_relation")]
)
BASES_SCHEMA = pa.schema(
    [("word", pa.string()), ("base", pa.string()), ("polarity", pa.int8()), ("affix", pa.string())]
)


@dataclass(frozen=True)
class Base:
    """What a word counts as: `affix` are the negating affixes that were taken off, outermost first, joined with +."""

    word: str
    polarity: int
    affix: str


class Flip(NamedTuple):
    """A pair as a source gives it, and what it became."""

    head: str
    tail: str
    relation: str
    source: str
    head_base: str
    tail_base: str
    new_relation: str


@dataclass
class Negation:
    """The bases of all negated words, and what they have done to the relations that went through :meth:`apply`."""

    bases: Mapping[str, Base]
    cycles: int
    flips: set[Flip] = field(default_factory=set)  # both directions of every pair
    acted: set[str] = field(default_factory=set)  # the negated words that stood in a pair
    kept: int = 0  # pairs of which a word was replaced and the relation stayed, as given

    def apply(self, relations: Iterable[Relation]) -> Iterator[Relation]:
        """The relations with each negated word replaced by its base."""
        for relation in relations:
            found = [self.bases.get(word.lower()) for word in (relation.head, relation.tail)]
            if not any(found):
                yield relation
                continue
            self.acted |= {
                word.lower() for word, base in zip((relation.head, relation.tail), found, strict=True) if base
            }
            polarity = 1
            for base in filter(None, found):
                polarity *= base.polarity
            head, tail = (base.word if base else word for word, base in zip(relation[:2], found, strict=True))
            kind = relation.relation
            if polarity < 0:
                kind = RELATIONS[1 - RELATIONS.index(kind)]
                self.flips.add(Flip(*relation, head, tail, kind))
                self.flips.add(Flip(relation.tail, relation.head, *relation[2:], tail, head, kind))
            else:
                self.kept += 1
            yield Relation(head, tail, kind, relation.source)

    def facts(self) -> dict[str, int]:
        """Counts for people: flips in both directions, pairs with words replaced but no flip, bases, and cycles."""
        return {"flips": len(self.flips), "kept": self.kept, "bases": len(self.acted), "cycles": self.cycles}

    def write(self, folder: Path) -> None:
        """Writes `flips.parquet` and `bases.parquet`, both sorted."""
        flips = sorted(self.flips)
        columns = {name: [getattr(flip, name) for flip in flips] for name in FLIPS_SCHEMA.names}
        pq.write_table(pa.table(columns, schema=FLIPS_SCHEMA), folder / FLIPS_FILE, compression="zstd")
        acted = [(word, self.bases[word]) for word in sorted(self.acted)]
        table = {
            "word": [word for word, _ in acted],
            "base": [base.word for _, base in acted],
            "polarity": [base.polarity for _, base in acted],
            "affix": [base.affix for _, base in acted],
        }
        pq.write_table(pa.table(table, schema=BASES_SCHEMA), folder / BASES_FILE, compression="zstd")


def find_negation(words: Mapping[str, Segmentation], known: Iterable[str]) -> Negation:
    """The bases of all words, followed to their ends.

    Args:
        words: MorphoLEX, in lower case.
        known: the words of the relations; the words of MorphoLEX are known as well.
    """
    # Where a word is spelled in several ways the one in lower case counts, then the last in alphabetical order.
    spelled = {word.lower(): word for word in sorted(known)}
    spelled |= {word: word for word in known if word == word.lower()}
    steps = {}
    for word, segmentation in words.items():
        step = _step(word, segmentation, words, spelled)
        if step is not None:
            steps[word] = step
    on_cycle, cycles = _cycles({word: base for word, (base, _) in steps.items()})
    bases = {}
    for word in steps:
        end, affixes = word, []
        while end in steps and end not in on_cycle:
            end, affix = steps[end]
            affixes.append(affix)
        if affixes:
            bases[word] = Base(spelled.get(end, end), (-1) ** len(affixes), "+".join(affixes))
    return Negation(bases, cycles)


def _step(
    word: str, segmentation: Segmentation, words: Mapping[str, Segmentation], known: Collection[str]
) -> tuple[str, str] | None:
    """(base, affix) when the word is negated."""
    (first_kind, first), (last_kind, last) = segmentation.morphemes[0], segmentation.morphemes[-1]
    affixes = []
    if first_kind == "prefix" and first in NEGATING_PREFIXES:
        affixes.append((first, word.removeprefix(first)))
    if last_kind == "suffix" and last in NEGATING_SUFFIXES:
        affixes.append((last, word.removesuffix(last)))
    for affix, rest in affixes:
        base = rest.strip("-")
        if base != word and (base in words or base in known):
            return base, affix
    roots = segmentation.of_kind("root")
    if len(affixes) == 1 and len(segmentation.morphemes) == 2 and len(roots) == 1:
        (root,) = roots
        if root != word and (root in words or root in known):
            return root, affixes[0][0]
    return None


def _cycles(base_of: Mapping[str, str]) -> tuple[set[str], int]:
    """The words that come back to themselves, and how many cycles they form."""
    on_cycle: set[str] = set()
    seen: set[str] = set()
    cycles = 0
    for start in base_of:
        path: dict[str, None] = {}
        word = start
        while word in base_of and word not in seen:
            seen.add(word)
            path[word] = None
            word = base_of[word]
        if word in path:
            cycles += 1
            walked = list(path)
            on_cycle.update(walked[walked.index(word) :])
    return on_cycle, cycles
