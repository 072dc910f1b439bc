"""The choice of the teacher's texts that become documents of the corpus, with the reasons why others do not.

A text first loses the line that announces it, and is cut after its last whole sentence. It becomes a document if it
is not a refusal, has enough words, does not repeat itself, and has the word that it has to use, perhaps inflected.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.artifacts import kinds
from dskd.config import Config
from dskd.corpus.files import Document
from dskd.corpus.written.blocks import FILE
from dskd.corpus.written.prompts import THOUGHTS
from dskd.errors import UserError
from dskd.lexicon.wordnet import open_wordnet

SENSES_FILE = "senses.parquet"
KEPT, ONLY_THOUGHTS, NO_SENTENCE, REFUSAL, TOO_SHORT, REPEATS, WITHOUT_WORD = (
    "kept",
    "only thoughts",
    "no whole sentence",
    "a refusal",
    "too short",
    "repeats itself",
    "the word does not occur",
)
_SCHEMA = pa.schema([("word", pa.string()), ("synset", pa.string()), ("number", pa.int32()), ("outcome", pa.string())])
_LEAST_WORDS = 5
_GRAM, _MOST_REPEATED = 3, 0.2  # the largest share of groups of three words that occur earlier in the text
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")
# The end of a sentence, with quotes and brackets that close there.
_END = re.compile(r"[.!?…。！？]+[\"'”’»)\]*_]*")
_TEXTS = "texts?|sentences?|paragraphs?|story|passage|examples?"
# What precedes the text itself and ends in a colon: a first line, or 'Sure! Here is a sentence with the word "hot":'.
_ANNOUNCEMENT = re.compile(
    r"(?:(?:sure|certainly|of course|absolutely|okay)\b[^\n.!:]{0,20}[.!,:]\s+)?"
    rf"(?:here(?:['’]s| is| are)\b[^\n:]*\b(?:{_TEXTS})\b[^\n:]*:[*_]*\s+|[^\n.!?]*:[*_\"”]* *\n\s*)",
    re.IGNORECASE,
)
# Only before a verb for something that a model is asked to do: "I can't believe how hot it is" begins a text.
_UNABLE = r"i(?: cannot| can not| can['’]t|(?:['’]m| am) (?:unable|not able) to)"
_SERVICES = (
    "write|provide|create|generate|produce|compose|fulfil|assist|help (?:you|with)|comply|do (?:that|this|so)|use|give|"
    "offer|complete|engage|respond|answer|continue|discuss"
)
_REFUSAL = re.compile(
    r"(?:unfortunately,? |i apologi[sz]e,? but |sorry,? (?:but )?)?"
    r"(?:i(?:['’]m| am) (?:(?:very|so|truly|really) )?sorry\b|as an? (?:ai|(?:large )?language model)\b|"
    rf"{_UNABLE} (?:\w+ly )?(?:{_SERVICES})\w*\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Judged:
    """A text of the teacher, cut after its last whole sentence, with its outcome."""

    word: str
    synset: str
    number: int
    text: str
    outcome: str  # KEPT, or the reason why it is dropped


@dataclass(frozen=True)
class SensesWithText:
    """The counts of the senses that were asked for, of those with a text, and of texts by their outcome."""

    asked: int  # the name that the manifest of the corpus has, too
    with_text: int
    outcomes: dict[str, int]

    def describe(self) -> str:
        """Returns the numbers in words."""
        dropped = ", ".join(f"{count:,} ({why})" for why, count in self.outcomes.items() if why != KEPT)
        return (
            f"{self.with_text:,} of {self.asked:,} senses have text ({self.with_text / max(self.asked, 1):.1%}); "
            f"{self.outcomes.get(KEPT, 0):,} texts kept, dropped: {dropped or 'none'}"
        )


def judge_texts(config: Config) -> list[Judged]:
    """Returns the outcome of each text of `WORKDIR/written`, in their order.

    Raises:
        UserError: when the file cannot be read as a table.
    """
    path = config.path(kinds.WRITTEN.folder, FILE)
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it again with `{kinds.WRITTEN.made_by}`") from None
    lemmas_of = _lemmas(open_wordnet(config.wordnet.path).reader)
    judged = []
    for row in rows:
        text = whole_sentences(without_announcement(row["text"]))
        outcome = judge(text, row["word"], row["part_of_speech"], lemmas_of)
        if row["text"] == THOUGHTS:
            outcome = ONLY_THOUGHTS
        judged.append(Judged(row["word"], row["synset"], row["number"], text, outcome))
    return judged


def judge(text: str, word: str, part_of_speech: str, lemmas_of: Callable[[str, str], set[str]]) -> str:
    """Returns KEPT, or why a text of whole sentences is dropped.

    `lemmas_of` returns the lemmas of a form in lower case, from the form and its part of speech.
    """
    words = [match.group().lower() for match in _WORD.finditer(text)]
    if not words:
        return NO_SENTENCE
    if _REFUSAL.match(text):
        return REFUSAL
    if len(words) < _LEAST_WORDS:
        return TOO_SHORT
    if repeated_share(words) > _MOST_REPEATED:
        return REPEATS
    if not _occurs(word.lower(), words, text, lambda form: lemmas_of(form, part_of_speech)):
        return WITHOUT_WORD
    return KEPT


def without_announcement(text: str) -> str:
    """Returns a text without the line or sentence before it that ends in a colon and announces it."""
    text = text.strip()
    announcement = _ANNOUNCEMENT.match(text)
    return text[announcement.end() :] if announcement else text


def whole_sentences(text: str) -> str:
    """Returns a text up to the end of its last whole sentence; an empty text if it has none."""
    text = text.strip()
    end = 0
    for match in _END.finditer(text):
        if match.end() == len(text) or text[match.end()].isspace():
            end = match.end()
    return text[:end]


def repeated_share(words: Sequence[str]) -> float:
    """Returns the share of the text's groups of three words that occur earlier in it."""
    groups = [tuple(words[start : start + _GRAM]) for start in range(len(words) - _GRAM + 1)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0


def documents_of(judged: Sequence[Judged]) -> Iterator[Document]:
    """Yields the texts that are kept as documents."""
    for each in judged:
        if each.outcome == KEPT:
            yield Document(f"{each.word} ({each.synset}) #{each.number}", each.text, each.text)


def write_senses(judged: Sequence[Judged], folder: Path) -> SensesWithText:
    """Writes the outcome of each text to `senses.parquet`, and returns the counts."""
    columns = {name: [getattr(each, name) for each in judged] for name in _SCHEMA.names}
    pq.write_table(pa.table(columns, schema=_SCHEMA), folder / SENSES_FILE, compression="zstd")
    senses = {(each.word, each.synset): False for each in judged}
    senses |= {(each.word, each.synset): True for each in judged if each.outcome == KEPT}
    outcomes = Counter(each.outcome for each in judged)
    return SensesWithText(len(senses), sum(senses.values()), dict(outcomes.most_common()))


def _occurs(word: str, words: Sequence[str], text: str, lemmas_of: Callable[[str], set[str]]) -> bool:
    if word in words or any(word in lemmas_of(form) for form in set(words)):
        return True
    # Words with other signs in them, such as c++ or 24/7.
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _lemmas(reader: Any) -> Callable[[str, str], set[str]]:
    """Returns a function from a form and its part of speech to its lemmas, by WordNet's own morphology (morphy)."""

    @functools.cache
    def lemmas_of(form: str, part_of_speech: str) -> set[str]:
        # All analyses, since `morphy` returns only one: for "found" the verb found, not find. The list of irregular
        # forms and the rules for endings both count: "leaves" is a form of leaf and of leave.
        part = "a" if part_of_speech == "s" else part_of_speech
        return {lemma for check in (True, False) for lemma in reader._morphy(form, part, check)}

    return lemmas_of
