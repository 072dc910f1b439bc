"""Negation polarity (docs/method.md, section 1): a word with a negating affix counts as its base with polarity -1.

*The affix* is the prefix at the beginning of the word, or the suffix at its end, if MorphoLEX's label for it is one of
`lexicon.negating_affixes`. If both are, the prefix is tried first. An affix further inside negates a part of the word,
not the word. A label can have several spellings: MorphoLEX labels the in- of *invisible*, *illegal* and *irregular* as
`<im<`, and the in- of *inside*, which is not a negation, as `<in<`.

*The base* is the word without the affix as the word spells it, if that is a known word. Known words are those of the
relations, and those of MorphoLEX unless the relations have them only with a capital (*Cline* is not the base of
*decline*). An i before a suffix may stand for a y (penniless, penny). Words without a known base stay as they are, and
so do those in :mod:`dskd.lexicon.not_negated`. Words are compared in lower case.

*Chains.* A base may itself be negated. The chain is followed to its end, and the polarities are multiplied. Every base
is shorter than its word, so no chain returns to itself.

*Pairs.* Each negated word is replaced by its base. When the polarities of the two words multiply to -1, synonym becomes
antonym and antonym becomes synonym: a flip. (happy, unhappy, antonym) becomes (happy, happy, synonym): a self-pair.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.lexicon.morpholex import Segmentation
from dskd.lexicon.not_negated import is_not_negated
from dskd.lexicon.relations import RELATIONS, Relation

# MorphoLEX's labels that words spell in several ways; every other label has only its own spelling.
SPELLINGS = {"im-": ("in", "im", "il", "ir", "ig"), "a-": ("an", "a")}
FLIPS_FILE, BASES_FILE = "flips.parquet", "bases.parquet"
BASES_SCHEMA = pa.schema(
    [("word", pa.string()), ("base", pa.string()), ("polarity", pa.int8()), ("affix", pa.string())]
)


@dataclass(frozen=True)
class Base:
    """The base that replaces a negated word."""

    word: str
    polarity: int  # 1 or -1
    affix: str  # the negating affixes that were removed, outermost first, joined with +


class Flip(NamedTuple):
    """A pair as a source gives it, and the pair that replaces it, with the other relation."""

    head: str
    tail: str
    relation: str
    source: str
    head_base: str
    tail_base: str
    new_relation: str


FLIPS_SCHEMA = pa.schema([(name, pa.string()) for name in Flip._fields])


@dataclass
class Negation:
    """The bases of all negated words, and a record of the changes that :meth:`apply` made with them."""

    bases: Mapping[str, Base]  # by negated word, in lower case
    flips: set[Flip] = field(default_factory=set)  # both directions of every pair
    replaced: set[str] = field(default_factory=set)  # the negated words that were in a pair
    kept: int = 0  # number of pairs, as the sources give them, in which a word was replaced but the relation stayed

    def apply(self, relations: Iterable[Relation]) -> Iterator[Relation]:
        """Yields the relations with each negated word replaced by its base, and records the changes."""
        for relation in relations:
            bases = [self.bases.get(word.lower()) for word in (relation.head, relation.tail)]
            if not any(bases):
                yield relation
                continue
            self.replaced |= {
                word.lower() for word, base in zip((relation.head, relation.tail), bases, strict=True) if base
            }
            # The relation flips when the polarities of the two words multiply to -1.
            polarity = 1
            for base in filter(None, bases):
                polarity *= base.polarity
            head, tail = (base.word if base else word for word, base in zip(relation[:2], bases, strict=True))
            kind = relation.relation
            if polarity < 0:
                kind = RELATIONS[1 - RELATIONS.index(kind)]
                self.flips.add(Flip(*relation, head, tail, kind))
                self.flips.add(Flip(relation.tail, relation.head, *relation[2:], tail, head, kind))
            else:
                self.kept += 1
            yield Relation(head, tail, kind, relation.source)

    def facts(self) -> dict[str, Any]:
        """Returns counts for the report: flips in both directions, pairs with a replaced word but no flip, and the
        replaced words, in all and by affix.
        """
        affixes = Counter(self.bases[word].affix for word in self.replaced)
        return {
            "flips": len(self.flips),
            "kept": self.kept,
            "bases": len(self.replaced),
            "bases_by_affix": dict(affixes.most_common()),
        }

    def write(self, folder: Path) -> None:
        """Writes `flips.parquet` and `bases.parquet`, both sorted."""
        flips = [flip._asdict() for flip in sorted(self.flips)]
        pq.write_table(pa.Table.from_pylist(flips, FLIPS_SCHEMA), folder / FLIPS_FILE, compression="zstd")
        replaced = [(word, self.bases[word]) for word in sorted(self.replaced)]
        bases = [{"word": w, "base": b.word, "polarity": b.polarity, "affix": b.affix} for w, b in replaced]
        pq.write_table(pa.Table.from_pylist(bases, BASES_SCHEMA), folder / BASES_FILE, compression="zstd")


def find_negation(words: Mapping[str, Segmentation], related: Iterable[str], affixes: Iterable[str]) -> Negation:
    """Finds the bases of all negated words, at the ends of their chains.

    `words` are those of MorphoLEX, in lower case, and `related` those of the relations, as the relations spell them.
    `affixes` are written as in `lexicon.negating_affixes` (`un-`, `-less`).
    """
    # Known words, in lower case; `names` are the words that the relations have only with a capital.
    related = set(related)
    in_lower_case = {word for word in related if word == word.lower()}
    names = {word.lower() for word in related} - in_lower_case
    known = in_lower_case | (words.keys() - names)
    negating = {affix: SPELLINGS.get(affix, (affix.strip("-"),)) for affix in affixes}
    # One step removes one affix; then follow the steps from each word to the end.
    steps = {}
    for word, segmentation in words.items():
        step = _step(word, segmentation, known, negating)
        if step is not None:
            steps[word] = step
    bases = {}
    for word in steps:
        end, taken = word, []
        while end in steps:
            end, affix = steps[end]
            taken.append(affix)
        bases[word] = Base(end, (-1) ** len(taken), "+".join(taken))
    return Negation(bases)


def _step(
    word: str, segmentation: Segmentation, known: Set[str], negating: Mapping[str, tuple[str, ...]]
) -> tuple[str, str] | None:
    """Returns (base, MorphoLEX's label of the affix) if the word is negated, and None otherwise."""
    if is_not_negated(word):
        return None
    (first_kind, first), (last_kind, last) = segmentation[0], segmentation[-1]
    rests = []
    if first_kind == "prefix" and f"{first}-" in negating:
        rests += [(word.removeprefix(letters), first) for letters in negating[f"{first}-"] if word.startswith(letters)]
    if last_kind == "suffix" and f"-{last}" in negating:
        for letters in negating[f"-{last}"]:
            if word.endswith(letters):
                rest = word.removesuffix(letters)
                rests.append((rest, last))
                if rest.endswith("i"):
                    rests.append((f"{rest[:-1]}y", last))
    for rest, affix in rests:
        base = rest.strip("-")
        if base != word and base in known:
            return base, affix
    return None
