"""Words to synonyms and antonyms (method, section 1): lexical resources become `lexicon/relations.parquet`.

A relation is (head, tail, relation, source). Both directions are kept. These rules make the table one that training can
trust, and each counts what it drops:

1. a word is never its own synonym or antonym;
2. a pair that the sources together give as synonym *and* antonym is contradictory and kept as neither;
3. a pair given several times by one source is kept once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.config import Config, LexiconConfig
from dskd.console import progress, say, stage
from dskd.errors import UserError, listed
from dskd.manifest import Recipe, build_artifact, read_manifest, sha256_of_file
from dskd.wordnet import WordNet, open_wordnet

FOLDER, FILE = "lexicon", "relations.parquet"
MADE_BY = "dskd lexicon --config FILE"
RELATIONS = ("synonym", "antonym")
SCHEMA = pa.schema([(name, pa.string()) for name in ("head", "tail", "relation", "source")])


@dataclass(frozen=True, order=True)
class Relation:
    """One directed pair of words; `relation` is `synonym` or `antonym`, `source` names the resource."""

    head: str
    tail: str
    relation: str
    source: str


def recipe(config: Config) -> Recipe:
    """What decides the content of the lexicon."""
    inputs = {f"tsv:{name}": sha256_of_file(_readable(Path(name))) for name in config.lexicon.tsv}
    if config.lexicon.wordnet:
        inputs["wordnet"] = open_wordnet(config.wordnet.path).digest
    return Recipe("lexicon", inputs, config.lexicon.as_dict())


def build_lexicon(config: Config) -> None:
    """Reads the configured sources and writes `WORKDIR/lexicon`."""
    target = config.path(FOLDER)
    sources = [*(["WordNet"] if config.lexicon.wordnet else []), *config.lexicon.tsv]
    with stage("lexicon: words to synonyms and antonyms", reads=sources, writes=target / FILE):
        with build_artifact(target, recipe(config)) as building:
            relations, dropped = resolve(read_sources(config.lexicon, config.wordnet.path))
            if not relations:
                raise UserError(f"the sources of the lexicon ({', '.join(map(str, sources))}) give no pair of words")
            counts = Counter(relation.relation for relation in relations)
            write_relations(building.folder / FILE, relations)
            building.facts.update(pairs=dict(counts), dropped=dict(dropped))
        say(
            f"  {counts['synonym']:,} synonym and {counts['antonym']:,} antonym pairs, both directions counted; "
            "dropped " + ", ".join(f"{number:,} {why}" for why, number in dropped.items())
        )


def read_sources(config: LexiconConfig, wordnet_path: str | None) -> Iterator[Relation]:
    """The relations of all sources as they stand there, one after the other."""
    if config.wordnet:
        yield from read_wordnet(open_wordnet(wordnet_path))
    for name in config.tsv:
        yield from read_tsv(Path(name))


def read_wordnet(wordnet: WordNet) -> Iterator[Relation]:
    """Lemma synonyms within a synset, and direct antonyms. Underscores of multi-word lemmas become spaces."""
    for synset in progress(wordnet.reader.all_synsets(), total=None, label="reading WordNet", unit="synsets"):
        lemmas = synset.lemmas()
        words = [_spelled(lemma) for lemma in lemmas]
        for head in words:
            for tail in words:
                if head != tail:
                    yield Relation(head, tail, "synonym", "wordnet")
        for lemma, head in zip(lemmas, words, strict=True):
            for antonym in lemma.antonyms():
                yield Relation(head, _spelled(antonym), "antonym", "wordnet")


def read_tsv(path: Path) -> Iterator[Relation]:
    """Lines `head<TAB>synonym|antonym<TAB>tail`; empty lines and lines that start with # are skipped.

    Raises:
        UserError: with every line that is not of that form.
    """
    try:
        lines = _readable(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    problems: list[str] = []
    relations: list[Relation] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 3 or not fields[0] or not fields[-1]:
            problems.append(f"{path}:{number}: expected head<TAB>synonym|antonym<TAB>tail, found {line!r}")
        elif fields[1] not in RELATIONS:
            problems.append(f"{path}:{number}: the relation must be synonym or antonym, found {fields[1]!r}")
        else:
            head, relation, tail = fields
            relations.append(Relation(head, tail, relation, path.name))
    if problems:
        raise UserError(listed(f"{len(problems)} lines of {path} are no relations; mend or remove them", problems))
    yield from relations


def resolve(relations: Iterable[Relation]) -> tuple[list[Relation], Counter[str]]:
    """Makes the relations symmetric, applies the module's rules, and counts what each rule dropped.

    Returns:
        The relations kept, sorted, and {why: directed pairs dropped}.
    """
    dropped: Counter[str] = Counter({"self-pairs": 0, "contradictory pairs": 0, "repeated": 0})
    kept: set[Relation] = set()
    for relation in relations:
        if relation.head == relation.tail:
            dropped["self-pairs"] += 1
        elif relation in kept:
            dropped["repeated"] += 1
        else:
            kept.add(relation)
    # A source that gives both directions itself does not repeat itself.
    kept |= {Relation(r.tail, r.head, r.relation, r.source) for r in kept}
    synonyms = {(r.head, r.tail) for r in kept if r.relation == "synonym"}
    contradictory = {(r.head, r.tail) for r in kept if r.relation == "antonym"} & synonyms
    dropped["contradictory pairs"] = len(contradictory)
    return sorted(r for r in kept if (r.head, r.tail) not in contradictory), dropped


def write_relations(path: Path, relations: list[Relation]) -> None:
    """Writes `relations.parquet` as design.md describes it."""
    columns = {name: [getattr(relation, name) for relation in relations] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def load_lexicon(config: Config) -> list[Relation]:
    """The relations of `WORKDIR/lexicon`.

    Raises:
        UserError: when there is no lexicon, or it is not one.
    """
    folder = config.path(FOLDER)
    read_manifest(folder, "lexicon", made_by=MADE_BY)
    try:
        columns = pq.read_table(folder / FILE, schema=SCHEMA).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error}); make it anew with `{MADE_BY}`") from None
    return [Relation(*row) for row in zip(*(columns[name] for name in SCHEMA.names), strict=True)]


def _spelled(lemma: Any) -> str:
    # "(p)" and the like say where an adjective may stand: syntax, no part of the word.
    return lemma.name().split("(")[0].replace("_", " ")


def _readable(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"lexicon.tsv: there is no file {path}; name one with lines head<TAB>synonym|antonym<TAB>tail")
    return path
