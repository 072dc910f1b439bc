"""`dskd inspect lexicon`: the sources of the pairs, the dropped pairs, and how much of the vocabulary they cover."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, is_current, read_manifest
from dskd.config import Config
from dskd.console import table
from dskd.errors import UserError, shortened
from dskd.inspection.artifacts import Teacher, note_lines, open_teacher, or_note
from dskd.inspection.tokens import whole_words
from dskd.lexicon.build import recipe
from dskd.lexicon.relations import FILE, RELATIONS, lexicon_manifest, load_lexicon, read_relations
from dskd.models.words import MIN_HEAD_LETTERS
from dskd.senses.dictionary import load_fitting_dictionary
from dskd.senses.entries import Entries, build_entries

_WHY_UNUSABLE = ("head_", "neighbour_")


@dataclass(frozen=True)
class Coverage:
    """The numbers of tokens that the lexicon covers, and of the lexicon's pairs that the tokenizer can express."""

    vocab_size: int
    whole_words: int  # tokens " word" of letters only, long enough to be a head
    heads: dict[str, int]  # whole words that are heads with a synonym, with an antonym, with either
    other_heads: int  # heads that are not whole words: they have a hyphen or a digit, or begin a text
    unusable: dict[str, int]  # directed pairs that the tokenizer cannot express, by reason
    usable: dict[str, int]  # directed pairs of the sense dictionary, by relation
    with_senses: dict[str, int] | None  # usable pairs with senses on both sides; None without a sense dictionary


@dataclass(frozen=True)
class WrittenTexts:
    """The number of senses with text that the teacher has written."""

    senses: int  # of words that are one token
    asked: int  # of which the teacher was to write
    with_text: int
    outcomes: dict[str, int]  # texts, by what became of them


@dataclass(frozen=True)
class LexiconReport:
    """The contents of the lexicon in numbers. Pairs are directed: both directions of a pair count."""

    path: Path
    pairs_by_source: dict[str, dict[str, int]]  # source -> relation -> pairs
    distinct: dict[str, int]  # relation -> pairs; a pair from several sources counts once
    heads: int  # distinct words
    facts: dict[str, Any]  # of the manifest: what was dropped, negated and malformed
    coverage: Coverage | None
    texts: WrittenTexts | None = None  # with corpus.source: teacher
    notes: list[str] = field(default_factory=list)


def inspect_lexicon(config: Config) -> LexiconReport:
    """Counts the pairs of the lexicon and, if there is a teacher, how well its tokenizer covers them. Raises a
    UserError without a lexicon.
    """
    manifest = lexicon_manifest(config)
    relations = read_relations(config)
    by_source: dict[str, dict[str, int]] = {}
    for group in relations.group_by(["source", "relation"]).aggregate([([], "count_all")]).to_pylist():
        by_source.setdefault(group["source"], dict.fromkeys(RELATIONS, 0))[group["relation"]] = group["count_all"]
    distinct = relations.group_by(["head", "tail", "relation"]).aggregate([])
    notes: list[str] = []
    of_config = or_note(lambda: recipe(config), "comparison with what the config names", notes)
    if of_config is not None and not is_current(config.path(kinds.LEXICON.folder), of_config):
        notes.append("the config names other sources or settings than this lexicon was made with")
    teacher = or_note(lambda: open_teacher(config), "coverage of the vocabulary", notes)
    return LexiconReport(
        config.path(kinds.LEXICON.folder, FILE),
        dict(sorted(by_source.items())),
        {relation: pc.sum(pc.equal(distinct["relation"], relation)).as_py() or 0 for relation in RELATIONS},
        pc.count_distinct(relations["head"]).as_py(),
        manifest.facts,
        None if teacher is None else _coverage(config, teacher, manifest, len(relations), notes),
        or_note(lambda: _written_texts(config), "senses with text", notes),
        notes,
    )


def compute_coverage(
    words: Mapping[int, str], entries: Entries, facts: Mapping[str, int], pairs: int | None, *, with_senses: bool
) -> Coverage:
    """Computes coverage from a tokenizer's whole words, the entries, and the counts (`facts`) made with the entries.

    `pairs` is the number of pairs in the lexicon; None if a pair of words can be several pairs of tokens, because of
    surface forms.
    """
    heads = {relation: entries.neighbours(relation).sizes > 0 for relation in RELATIONS}
    reasons = {why.replace("_", " "): count for why, count in facts.items() if why.startswith(_WHY_UNUSABLE)}
    usable = {relation: facts[f"{relation}_pairs"] for relation in RELATIONS}
    if pairs is not None and (alike := pairs - sum(reasons.values()) - sum(usable.values())):
        reasons["the same pair to the tokenizer, or from another source"] = alike
    heads["either"] = heads["synonym"] | heads["antonym"]
    is_word = heads["either"].new_zeros(entries.vocab_size)
    is_word[list(words)] = True
    return Coverage(
        entries.vocab_size,
        len(words),
        {name: int((is_head & is_word).sum()) for name, is_head in heads.items()},
        int((heads["either"] & ~is_word).sum()),
        reasons,
        usable,
        {relation: facts[f"{relation}_pairs_with_senses"] for relation in RELATIONS} if with_senses else None,
    )


def _coverage(config: Config, teacher: Teacher, lexicon: Manifest, pairs: int, notes: list[str]) -> Coverage:
    words = whole_words(teacher.tokenizer, teacher.vocab_size)
    forms = config.senses.surface_forms
    pairs_or_none = None if forms else pairs
    with contextlib.suppress(UserError):  # without a dictionary, the entries are built from the lexicon, below
        dictionary, made = load_fitting_dictionary(config, teacher.folder)
        has_same_forms = tuple(made.config.get("surface_forms", ())) == forms
        if made.inputs.get("lexicon") == lexicon.digest and has_same_forms:
            return compute_coverage(words, dictionary.entries, made.facts, pairs_or_none, with_senses=True)
    notes.append(
        "no pairs with senses: there is no sense dictionary of this lexicon, teacher and senses.surface_forms; "
        f"make it with `{kinds.SENSES.made_by}`"
    )
    entries, facts = build_entries(load_lexicon(config), teacher.tokenizer, teacher.vocab_size, forms)
    return compute_coverage(words, entries, facts, pairs_or_none, with_senses=False)


def _written_texts(config: Config) -> WrittenTexts | None:
    if config.corpus.source != "teacher":
        return None
    written = read_manifest(config.path(kinds.WRITTEN.folder), kinds.WRITTEN.name)
    corpus = read_manifest(config.path(kinds.CORPUS.folder), kinds.CORPUS.name)
    if "senses" not in corpus.facts:
        raise UserError(
            f"{config.path(kinds.CORPUS.folder)}: this corpus has another source; make it again with "
            f"`{kinds.CORPUS.made_by}`"
        )
    return WrittenTexts(written.facts["senses_of_one_token"], **corpus.facts["senses"])


def format_lexicon(report: LexiconReport) -> str:
    """Formats the report as text."""
    rows = [[source, *(f"{counts[kind]:,}" for kind in RELATIONS)] for source, counts in report.pairs_by_source.items()]
    rows.append(["all, each pair once", *(f"{report.distinct[kind]:,}" for kind in RELATIONS)])
    lines = [
        f"{report.path}: {report.heads:,} words; both directions of every pair are counted",
        "",
        table(["pairs by source", "synonym", "antonym"], rows),
    ]
    if dropped := report.facts.get("dropped"):
        lines += ["", _counts("dropped while the lexicon was made", dropped)]
    if negation := report.facts.get("negation"):
        numbers = {name: count for name, count in negation.items() if isinstance(count, int)}
        lines += ["", _counts("negating affixes", numbers, "number")]
    if malformed := report.facts.get("malformed"):
        rows = [
            [file, f"{skipped['lines']:,}", shortened(skipped["first"], total=skipped["lines"])]
            for file, skipped in malformed.items()
        ]
        lines += ["", table(["malformed lines, skipped", "number", "at"], rows)]
    if report.coverage is not None:
        lines += ["", *_coverage_lines(report.coverage)]
    if report.texts is not None:
        lines += ["", *_text_lines(report.texts)]
    lines += note_lines(report.notes)
    return "\n".join(lines)


def _text_lines(texts: WrittenTexts) -> list[str]:
    rows = [["of words that are one token", f"{texts.senses:,}", ""]]
    for label, count, of, whole in (
        ("  for which the teacher was to write", texts.asked, texts.senses, "these"),
        ("    with text in the corpus", texts.with_text, texts.asked, "these"),
    ):
        rows.append([label, f"{count:,}", f"{100 * count / max(of, 1):.1f} % of {whole}"])
    return [table(["senses", "number", "share"], rows), "", _counts("texts", texts.outcomes, "number")]


def _coverage_lines(coverage: Coverage) -> list[str]:
    def row(label: str, count: int, of: int, what: str) -> list[str]:
        return [label, f"{count:,}", f"{100 * count / of:.1f} % of {what}" if of else "-"]

    words = coverage.whole_words
    vocabulary = [
        ["tokens of the vocabulary", f"{coverage.vocab_size:,}", ""],
        row(f"  whole words of {MIN_HEAD_LETTERS} letters or more", words, coverage.vocab_size, "all"),
        row("    with synonyms", coverage.heads["synonym"], words, "words"),
        row("    with antonyms", coverage.heads["antonym"], words, "words"),
        row("    with either", coverage.heads["either"], words, "words"),
        ["  other heads (with a hyphen, at the start of a text, …)", f"{coverage.other_heads:,}", ""],
    ]
    pairs = [["usable", *(f"{coverage.usable[kind]:,}" for kind in RELATIONS)]]
    if coverage.with_senses is not None:
        pairs.append(["  with senses on both sides", *(f"{coverage.with_senses[kind]:,}" for kind in RELATIONS)])
    return [
        table(["vocabulary", "tokens", "share"], vocabulary),
        "",
        _counts("pairs this tokenizer cannot express", coverage.unusable),
        "",
        table(["pairs for this tokenizer", *RELATIONS], pairs),
    ]


def _counts(title: str, counts: Mapping[str, int], unit: str = "pairs") -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return table([title, unit], [[why.replace("_", " "), f"{count:,}"] for why, count in ordered])
