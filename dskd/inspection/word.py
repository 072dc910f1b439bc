"""`dskd inspect word`: everything the artifacts contain about one word."""

import difflib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pyarrow.compute as pc
import pyarrow.parquet as pq

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest
from dskd.config import Config
from dskd.console import table
from dskd.errors import UserError, counted
from dskd.inspection.artifacts import Teacher, note_lines, open_teacher, or_note
from dskd.inspection.contexts import find_contexts, open_training_shards
from dskd.inspection.neighbours import nearest_entries
from dskd.inspection.tokens import entry_texts, readable, token_texts
from dskd.lexicon.negation import BASES_FILE
from dskd.lexicon.relations import RELATIONS, lexicon_manifest, read_relations
from dskd.models.words import MIN_HEAD_LETTERS, tokenize_form, tokenize_words
from dskd.senses.dictionary import SenseDictionary, load_fitting_dictionary
from dskd.senses.entries import MAX_SPAN_TOKENS, Entries

_NEAR_SPELLINGS = 5
# What the contexts of a span show: targets are tokens, so a span is a synonym of a target, and never the target itself.
_OF_SPANS = "a synonym, pulled to this sense"


@dataclass(frozen=True)
class RelatedWord:
    """A synonym or antonym of the word."""

    relation: str
    word: str
    sources: tuple[str, ...]
    tokens: int | None = None  # number of tokens; None without a tokenizer
    senses: int | None = None  # number of senses; None without a sense dictionary, or if it is too long for an entry


@dataclass(frozen=True)
class WordSense:
    """A row of the sense dictionary that belongs to the word."""

    row: int
    count: int  # states that it was made from
    neighbours: tuple[tuple[str, float, str], ...]  # word, distance, relation ("" if it is not related)
    contexts: tuple[str, ...]


@dataclass(frozen=True)
class WordReport:
    """The facts about a word. A field is None or empty if the artifact it comes from is missing."""

    word: str
    related: tuple[RelatedWord, ...]
    near_spellings: tuple[str, ...] = ()
    pieces: tuple[str, ...] | None = None  # the tokens as readable text
    tokens: tuple[int, ...] | None = None
    head: str | None = None  # text on whether it is a usable head, and why not
    forms: tuple[tuple[str, int], ...] = ()  # surface forms in which it is also a head, each with its token
    senses: tuple[WordSense, ...] | None = None
    contexts_are: str = ""  # what the example contexts show
    notes: list[str] = field(default_factory=list)


def inspect_word(
    config: Config,
    word: str,
    *,
    neighbours: int = 8,
    contexts: int = 3,
    scan: int = 20_000,
    teacher: Teacher | None = None,
) -> WordReport:
    """Looks a word up in the lexicon, the tokenizer, the sense dictionary and the training shards.

    `word` is spelled as in the lexicon, and may be several words. Each sense gets up to `neighbours` nearest entries,
    and `contexts` examples from the first `scan` training samples. `teacher` is the config's, if it was opened before.
    Raises a UserError when there is no lexicon, or the word is neither in it nor in the sense dictionary.
    """
    related, near = find_related(config, word)
    notes: list[str] = []
    teacher = teacher or or_note(lambda: open_teacher(config), "tokens and senses", notes)
    if teacher is None:
        if not related:
            raise UserError(_unknown(word, near, None))
        return WordReport(word, related, near, notes=notes)
    tokens, *tails = tokenize_words([word, *(other.word for other in related)], teacher.tokenizer, teacher.vocab_size)
    pieces = tuple(readable(text) for text in token_texts(teacher.tokenizer, [[token] for token in tokens]))
    senses = or_note(lambda: load_fitting_dictionary(config, teacher.folder), "senses", notes)
    if senses is None:
        if not related:
            raise UserError(_unknown(word, near, pieces))
        related = tuple(_measured(other, ids, None) for other, ids in zip(related, tails, strict=True))
        return WordReport(word, related, near, pieces, tokens, _head(word, tokens, None), notes=notes)
    dictionary, manifest = senses
    if manifest.inputs.get("lexicon") not in (None, lexicon_manifest(config).digest):
        notes.append("the lexicon was rebuilt after the sense dictionary, so their relations may differ")
    rows = dictionary.rows_of_tokens(tokens)
    if not related and not rows:
        raise UserError(_unknown(word, near, pieces) + _replaced(config, word))
    contexts_are = ""
    word_senses: tuple[WordSense, ...] = ()
    if rows:
        nearest = _nearest(dictionary, teacher, tokens, rows, neighbours)
        places = _places(config, teacher, manifest, tokens, rows, contexts, scan, notes)
        word_senses = tuple(
            WordSense(row, int(dictionary.counts[row]), near, tuple(places.get(row, ())))
            for row, near in zip(rows, nearest, strict=True)
        )
        if any(places.values()):
            contexts_are = "where this sense of it is the nearest" if len(tokens) == 1 else _OF_SPANS
    related = tuple(_measured(other, ids, dictionary) for other, ids in zip(related, tails, strict=True))
    head = _head(word, tokens, dictionary.entries)
    forms = _forms(word, dictionary, manifest, teacher)
    return WordReport(word, related, near, pieces, tokens, head, forms, word_senses, contexts_are, notes)


def find_related(config: Config, word: str) -> tuple[tuple[RelatedWord, ...], tuple[str, ...]]:
    """Returns the word's relations in `WORKDIR/lexicon`, with all their sources, or near spellings if it has none.
    Raises a UserError without a lexicon.
    """
    lexicon_manifest(config)
    relations = read_relations(config, filters=[("head", "==", word)]).to_pylist()
    sources: dict[tuple[str, str], set[str]] = {}
    for relation in relations:
        sources.setdefault((relation["relation"], relation["tail"]), set()).add(relation["source"])
    order = sorted(sources, key=lambda key: (RELATIONS.index(key[0]), key[1]))
    related = tuple(RelatedWord(relation, tail, tuple(sorted(sources[relation, tail]))) for relation, tail in order)
    if related:
        return related, ()
    heads = pc.unique(read_relations(config, columns=["head"])["head"]).to_pylist()
    return (), near_spellings(word, heads)


def near_spellings(word: str, words: Iterable[str]) -> tuple[str, ...]:
    """Returns the words whose spelling is most similar to `word`, ignoring case."""
    # difflib compares every pair of letters, which is slow, so words of a very different length are left out first.
    spelled = {other.lower(): other for other in words if abs(len(other) - len(word)) <= 2}
    return tuple(spelled[other] for other in difflib.get_close_matches(word.lower(), spelled, n=_NEAR_SPELLINGS))


def _nearest(
    dictionary: SenseDictionary, teacher: Teacher, tokens: tuple[int, ...], rows: range, count: int
) -> list[tuple[tuple[str, float, str], ...]]:
    """Returns, for each row, the `count` nearest other entries: word, distance, and relation to the word or ""."""
    entries, entry = dictionary.entries, dictionary.entries.find(tokens)
    if not count or entry is None:
        return [() for _ in rows]
    relation_of = {}
    if len(tokens) == 1:
        relation_of = {other: kind for kind in RELATIONS for other in entries.neighbours(kind).of(tokens[0])}
    nearest = nearest_entries(dictionary, rows, count, without=entry)
    numbers = sorted({neighbour.entry for of_row in nearest for neighbour in of_row})
    names = dict(zip(numbers, entry_texts(entries, numbers, teacher.tokenizer), strict=True))
    return [tuple((names[n.entry], n.distance, relation_of.get(n.entry, "")) for n in near) for near in nearest]


def _places(
    config: Config,
    teacher: Teacher,
    senses: Manifest,
    tokens: tuple[int, ...],
    rows: range,
    per_row: int,
    scan: int,
    notes: list[str],
) -> dict[int, list[str]]:
    """Returns example contexts of each row of the word."""
    shards = None
    if per_row and scan:
        shards = or_note(lambda: open_training_shards(config, senses), "example contexts", notes)
    if shards is None:
        return {}
    folder, manifest = shards
    samples = manifest.facts["samples"]
    places, samples_read = find_contexts(
        folder, samples, rows, teacher.tokenizer, of_synonyms=len(tokens) > 1, per_row=per_row, scan=scan
    )
    if samples_read == min(scan, samples) < samples:
        notes.append(
            f"contexts are from the first {samples_read:,} of {samples:,} training samples; --scan N reads more"
        )
    return places


def _measured(related: RelatedWord, tokens: tuple[int, ...], dictionary: SenseDictionary | None) -> RelatedWord:
    """Returns the related word with its numbers of tokens and senses."""
    senses = None
    if dictionary is not None and 1 <= len(tokens) <= MAX_SPAN_TOKENS:
        senses = len(dictionary.rows_of_tokens(tokens))
    return replace(related, tokens=len(tokens), senses=senses)


def _head(word: str, tokens: tuple[int, ...], entries: Entries | None) -> str:
    """Returns a text on whether training can use the word's relations, and why not."""
    if len(tokens) != 1:
        return f"no usable head: it is {len(tokens)} tokens, and a head must be one"
    if len(word) < MIN_HEAD_LETTERS:
        return f"no usable head: it is shorter than {MIN_HEAD_LETTERS} letters"
    if entries is None:
        return "a head, if one of its relations can be expressed"
    numbers = {kind: len(entries.neighbours(kind).of(tokens[0])) for kind in RELATIONS}
    if not any(numbers.values()):
        return "no usable head: the sense dictionary has no synonym and no antonym of it"
    counts = " and ".join(counted(number, kind) for kind, number in numbers.items())
    return f"a usable head: {counts} in the sense dictionary"


def _forms(word: str, dictionary: SenseDictionary, manifest: Manifest, teacher: Teacher) -> tuple[tuple[str, int], ...]:
    """Returns the dictionary's surface forms in which the word is a usable head, with the token of each."""
    if len(word) < MIN_HEAD_LETTERS:
        return ()
    heads = []
    for form in manifest.config.get("surface_forms", ()):
        for (token,) in tokenize_form([word], form, teacher.tokenizer, teacher.vocab_size).values():
            if any(dictionary.entries.neighbours(kind).of(token) for kind in RELATIONS):
                heads.append((form, token))
    return tuple(heads)


def _replaced(config: Config, word: str) -> str:
    """Returns a sentence on how the rule for negating affixes replaced the word, or an empty text if it did not."""
    path = config.path(kinds.LEXICON.folder, BASES_FILE)
    if not path.is_file():
        return ""
    bases = pq.read_table(path, filters=[("word", "==", word.lower())]).to_pylist()
    if not bases:
        return ""
    sign = "negated" if bases[0]["polarity"] < 0 else "twice negated"
    return f". It counts as {bases[0]['base']!r}, {sign}: lexicon.morpholex is set, and {path} lists such words"


def _unknown(word: str, near: tuple[str, ...], pieces: tuple[str, ...] | None) -> str:
    text = f"{word!r} is not in the lexicon"
    if pieces is not None:
        made = f"{counted(len(pieces), 'token')} of it ({' | '.join(pieces)})"
        text += f", and has no senses of its own: the tokenizer makes {made}"
    return text + (f"; near spellings: {', '.join(near)}" if near else "; no similar spelling")


def format_word(report: WordReport) -> str:
    """Formats the report as text."""
    lines = [report.word]
    if report.tokens is not None and report.pieces is not None:
        shown = ", ".join(f"{piece} ({token})" for piece, token in zip(report.pieces, report.tokens, strict=True))
        lines.append(f"  {counted(len(report.tokens), 'token')}: {shown}")
    if report.head is not None:
        lines.append(f"  {report.head}")
    lines += [f"  also a head when {form.replace('_', '-')} (token {token})" for form, token in report.forms]
    if not report.related:
        near = f"; near spellings: {', '.join(report.near_spellings)}" if report.near_spellings else ""
        lines.append(f"  not in the lexicon{near}")
    if report.related:
        lines += ["", f"Relations: {len(report.related)}", textwrap.indent(_relations_table(report), "  ")]
    if report.senses is not None:
        lines += ["", *_sense_lines(report)]
    lines += note_lines(report.notes)
    return "\n".join(lines)


def _relations_table(report: WordReport) -> str:
    header, rows = ["relation", "word", "from"], [[r.relation, r.word, ", ".join(r.sources)] for r in report.related]
    if report.tokens is not None:
        header.append("tokens")
        rows = [[*row, f"{related.tokens}"] for row, related in zip(rows, report.related, strict=True)]
    if report.senses is not None:
        header.append("senses")
        rows = [
            [*row, "too long" if related.senses is None else f"{related.senses}"]
            for row, related in zip(rows, report.related, strict=True)
        ]
    return table(header, rows, left=3)


def _sense_lines(report: WordReport) -> list[str]:
    assert report.senses is not None
    if not report.senses:
        why = "none of the teacher's states belongs to it" if len(report.tokens or ()) == 1 else "it is not a span"
        return [f"Senses: none, as {why}"]
    total = sum(sense.count for sense in report.senses)
    lines = [f"Senses: {len(report.senses)}, of {total:,} states"]
    for sense in report.senses:
        lines.append(f"  row {sense.row}: {counted(sense.count, 'state')}")
        if sense.neighbours:
            near = (f"{name} {far:.2f}{f' ({how})' if how else ''}" for name, far, how in sense.neighbours)
            lines.append(f"    near: {', '.join(near)}")
        lines += [f"    - {context}" for context in sense.contexts]
    if report.contexts_are:
        lines.append(f"  «»: {report.contexts_are}")
    return lines
