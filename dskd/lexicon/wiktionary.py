"""Reads Wiktionary as extracted by Wiktextract (kaikki.org): JSON lines, one entry per word and part of speech.

Synonyms and antonyms are in `senses[]`, or in the entry itself if Wiktextract could not tell the sense:

    {"word": "big", "lang": "English", "senses": [{"synonyms": [{"word": "large"}]}], "antonyms": [{"word": "small"}]}

The file of all languages has more than 20 GB. It is read line by line, and only the relations are kept.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from sys import intern
from typing import Any

from dskd.errors import UserError
from dskd.lexicon.reading import MalformedError, Report, is_storable, stream_lines
from dskd.lexicon.relations import RELATIONS, Relation

SOURCE = "wiktionary"
OTHER_LANGUAGES = "Wiktionary entries of other languages"
REDIRECTS = "Wiktionary redirects"
THESAURUS = "Wiktionary thesaurus pages"
NO_WORD = "Wiktionary neighbours without a word"
_KEYS = tuple((f"{relation}s", relation) for relation in RELATIONS)
_NAMED_LANGUAGES = 10


def read_wiktionary(path: Path, language: str, report: Report) -> Iterator[Relation]:
    """Yields the relations of the entries whose `lang` is `language`.

    Drops entries of other languages, redirects, neighbours that are pages of the thesaurus (`Thesaurus:…`) and
    neighbours without a word, and counts them in the report. Skips malformed lines, and adds their numbers to the
    report.

    Raises:
        UserError: when most lines are malformed, or no entry has the language.
    """
    languages: Counter[str] = Counter()
    lines = 0
    for number, line in stream_lines(path, report):
        lines += 1
        try:
            entry = _entry(line)
            if entry is None:
                report.dropped[REDIRECTS] += 1
                continue
            languages[entry["lang"]] += 1
            relations = _relations(entry, report.dropped) if entry["lang"] == language else []
        except MalformedError as malformed:
            report.add_malformed(str(path), number, str(malformed))
            continue
        yield from relations
    report.finish(str(path), lines, "entries of Wiktextract")
    if language not in languages:
        raise UserError(_no_such_language(path, language, languages))
    report.dropped[OTHER_LANGUAGES] += languages.total() - languages[language]


def _entry(line: str) -> dict[str, Any] | None:
    """Parses a line as an entry, which has a word and a language; returns None for a redirect. Raises a MalformedError
    for anything else.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"it is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise MalformedError(f"it is not an object but a {type(entry).__name__}")
    if "redirect" in entry and "word" not in entry:
        return None
    for key in ("word", "lang"):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip() or not is_storable(value):
            raise MalformedError(f'it has no "{key}" that is text')
    return entry


def _relations(entry: dict[str, Any], dropped: Counter[str]) -> list[Relation]:
    head = _spelled(entry["word"])
    senses = entry.get("senses") or ()
    if not isinstance(senses, list | tuple):
        raise MalformedError('its "senses" are not a list')
    relations = []
    losses: Counter[str] = Counter()
    for part in (*senses, entry):
        if not isinstance(part, dict):
            raise MalformedError("one of its senses is not an object")
        for key, relation in _KEYS:
            neighbours = part.get(key) or ()
            if not isinstance(neighbours, list | tuple):
                raise MalformedError(f'its "{key}" are not a list')
            for neighbour in neighbours:
                word = neighbour.get("word") if isinstance(neighbour, dict) else None
                if not isinstance(word, str) or not word.strip() or not is_storable(word):
                    losses[NO_WORD] += 1
                elif word.startswith("Thesaurus:") or head.startswith("Thesaurus:"):
                    losses[THESAURUS] += 1
                else:
                    relations.append(Relation(head, _spelled(word), relation, SOURCE))
    dropped.update(losses)
    return relations


def _spelled(word: str) -> str:
    # The same words occur many times: keeping one copy of each saves memory.
    return intern(" ".join(word.split()))


def _no_such_language(path: Path, language: str, languages: Counter[str]) -> str:
    if not languages:
        return f"{path}: there is no entry in this file; fetch it again, or name another"
    most_common = ", ".join(f"{name} ({count:,})" for name, count in languages.most_common(_NAMED_LANGUAGES))
    more = f" and {len(languages) - _NAMED_LANGUAGES} more" if len(languages) > _NAMED_LANGUAGES else ""
    return (
        f"{path}: no entry has the language {language!r}; its languages are {most_common}{more}. Each language "
        "edition of Wiktionary has its own names for languages: name the file of the right edition, or set "
        "lexicon.wiktionary_language to the name in this one"
    )
