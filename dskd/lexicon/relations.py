"""Relations between words, and the rules for a table of relations that training can trust.

A relation is (head, tail, relation, source). Both directions are kept. Every rule counts what it drops:

1. Self-pairs: a word is never its own synonym or antonym, neither in a source nor after negated words were replaced by
   their bases (:mod:`dskd.lexicon.negation`). Every occurrence counts.
2. Repeated pairs: a pair that one source gives several times is kept once. Every repetition counts. A source that gives
   both directions of a pair does not repeat it.
3. Contradictory pairs: a pair that the sources together give as synonym *and* antonym is kept as neither. This rule is
   applied last, to the pairs after negation. Counted in both directions.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config
from dskd.errors import UserError

FILE = "relations.parquet"
RELATIONS = ("synonym", "antonym")
_BITS_A_SOURCE = 4  # synonym and antonym, each in two directions
_SYNONYM_BITS, _ANTONYM_BITS = 0b0011, 0b1100


class Relation(NamedTuple):
    """One directed pair of words; `relation` is `synonym` or `antonym`, and `source` names the resource.

    It is a tuple because there can be millions, and tuples are compared and hashed without running Python code.
    """

    head: str
    tail: str
    relation: str
    source: str


SCHEMA = pa.schema([(name, pa.string()) for name in Relation._fields])


class Pairs:
    """A set of distinct relations; its memory grows with the distinct pairs of words, not with the relations read.

    It stores each pair of words once, in alphabetical order, with one bit for every source, relation and direction in
    which it was given. `dropped`, {reason: number}, may be a counter that other code updates too.
    """

    def __init__(self, relations: Iterable[Relation], dropped: Counter[str] | None = None) -> None:
        self.dropped: Counter[str] = Counter() if dropped is None else dropped
        self.dropped.update({"self-pairs": 0, "contradictory pairs": 0, "repeated": 0})
        self._bits: dict[tuple[str, str], int] = {}
        self._sources: dict[str, int] = {}
        for relation in relations:
            self.add(relation)

    def add(self, relation: Relation) -> None:
        """Adds a relation, or counts the reason for dropping it (rules 1 and 2)."""
        head, tail, kind, source = relation
        if head == tail:
            self.dropped["self-pairs"] += 1
            return
        pair = (head, tail) if head < tail else (tail, head)
        index = self._sources.setdefault(source, len(self._sources))
        bit = 1 << (_BITS_A_SOURCE * index + 2 * RELATIONS.index(kind) + (head > tail))
        known = self._bits.get(pair, 0)
        if known & bit:
            self.dropped["repeated"] += 1
        else:
            self._bits[pair] = known | bit

    def __iter__(self) -> Iterator[Relation]:
        """Yields the relations, each once, in the directions in which they were given."""
        for (low, high), bits in self._bits.items():
            for source, index in self._sources.items():
                for number, kind in enumerate(RELATIONS):
                    directions = bits >> (_BITS_A_SOURCE * index + 2 * number)
                    if directions & 1:
                        yield Relation(low, high, kind, source)
                    if directions & 2:
                        yield Relation(high, low, kind, source)

    def words(self) -> set[str]:
        """Returns every word that has a relation."""
        return {word for pair in self._bits for word in pair}

    def resolved(self) -> list[Relation]:
        """Returns both directions of every pair that is not contradictory (rule 3), sorted, and counts the others."""
        # Masks of the synonym bits, and of the antonym bits, of all sources.
        count = len(self._sources)
        synonyms = sum(_SYNONYM_BITS << (_BITS_A_SOURCE * index) for index in range(count))
        antonyms = sum(_ANTONYM_BITS << (_BITS_A_SOURCE * index) for index in range(count))
        kept = []
        for (low, high), bits in self._bits.items():
            if bits & synonyms and bits & antonyms:
                self.dropped["contradictory pairs"] += 2
                continue
            kind = RELATIONS[0] if bits & synonyms else RELATIONS[1]
            for source, index in self._sources.items():
                if bits >> (_BITS_A_SOURCE * index) & (_SYNONYM_BITS | _ANTONYM_BITS):
                    kept += [Relation(low, high, kind, source), Relation(high, low, kind, source)]
        kept.sort()
        return kept


def count_pairs(relations: Iterable[Relation]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Counts directed pairs by relation, and by source and relation; the former counts a pair from two sources once.
    The relations are sorted, as :meth:`Pairs.resolved` returns them.
    """
    pairs = dict.fromkeys(RELATIONS, 0)
    by_source: dict[str, dict[str, int]] = {}
    for (_, _, kind), group in groupby(relations, key=lambda relation: relation[:3]):
        pairs[kind] += 1
        for relation in group:
            by_source.setdefault(relation.source, dict.fromkeys(RELATIONS, 0))[kind] += 1
    return pairs, dict(sorted(by_source.items()))


def write_relations(path: Path, relations: list[Relation]) -> None:
    """Writes `relations.parquet` in the format that docs/formats.md describes."""
    columns = {name: [getattr(relation, name) for relation in relations] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def lexicon_manifest(config: Config) -> Manifest:
    """Reads the manifest of `WORKDIR/lexicon`. Raises a UserError when there is no lexicon, or it is damaged."""
    return read_manifest(config.path(kinds.LEXICON.folder), kinds.LEXICON.name)


def read_relations(config: Config, **options: Any) -> pa.Table:
    """Reads the table of `WORKDIR/lexicon`, or the part of it that `options` for pyarrow's `read_table` select. Raises
    a UserError when the file cannot be read as a table.
    """
    path = config.path(kinds.LEXICON.folder, FILE)
    try:
        return pq.read_table(path, **options)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it again with `{kinds.LEXICON.made_by}`") from None


def load_lexicon(config: Config) -> list[Relation]:
    """Loads the relations of `WORKDIR/lexicon`; raises the errors of :func:`lexicon_manifest` and
    :func:`read_relations`.
    """
    lexicon_manifest(config)
    columns = read_relations(config, schema=SCHEMA).to_pydict()
    return [Relation(*row) for row in zip(*(columns[name] for name in SCHEMA.names), strict=True)]
