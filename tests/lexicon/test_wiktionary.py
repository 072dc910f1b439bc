"""Wiktionary as Wiktextract writes it: entries shaped like those of kaikki.org."""

import gzip
import json

import pytest

from dskd.errors import UserError
from dskd.lexicon.reading import Report
from dskd.lexicon.wiktionary import read_wiktionary

BIG = {
    "pos": "adj",
    "head_templates": [{"name": "en-adj", "args": {"1": "er"}, "expansion": "big (comparative bigger)"}],
    "word": "big",
    "lang": "English",
    "lang_code": "en",
    "translations": [{"lang": "French", "code": "fr", "word": "grand"}],
    "senses": [
        {
            "glosses": ["Of great size, large."],
            "synonyms": [{"word": "large", "source": "Thesaurus:big"}, {"word": "Thesaurus:big"}, {"word": "big"}],
            "antonyms": [{"word": "small"}, {"word": "  little\tone "}],
        },
        {"glosses": ["Mature."], "synonyms": [{"sense": "mature"}]},
        {"glosses": ["No relation at all."]},
    ],
    "antonyms": [{"word": "tiny", "sense": "of size"}],
    "synonyms": [{"word": "ample"}],
}
GRAND = {"word": "grand", "lang": "French", "lang_code": "fr", "senses": [{"synonyms": [{"word": "gros"}]}]}
RUN = {"word": "run", "lang": "English", "senses": [{"glosses": ["to move fast"]}]}
REDIRECT = {"title": "Bigger", "redirect": "bigger", "pos": "hard-redirect"}


def _write(path, *lines):
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _read(path, language="English"):
    report = Report()
    return [(r.head, r.relation, r.tail, r.source) for r in read_wiktionary(path, language, report)], report


@pytest.mark.parametrize("name", ["english.jsonl", "english.jsonl.gz"])
def test_relations_of_senses_and_of_the_entry_itself(tmp_path, name):
    relations, report = _read(_write(tmp_path / name, BIG, GRAND, RUN, REDIRECT, "", GRAND))
    assert relations == [
        ("big", "synonym", "large", "wiktionary"),
        ("big", "synonym", "big", "wiktionary"),
        ("big", "antonym", "small", "wiktionary"),
        ("big", "antonym", "little one", "wiktionary"),
        ("big", "synonym", "ample", "wiktionary"),
        ("big", "antonym", "tiny", "wiktionary"),
    ]
    assert dict(report.dropped) == {
        "Wiktionary entries of other languages": 2,
        "Wiktionary redirects": 1,
        "Wiktionary thesaurus pages": 1,
        "Wiktionary neighbours without a word": 1,
    }
    assert not report.malformed


def test_only_entries_of_the_configured_language_are_read(tmp_path):
    relations, report = _read(_write(tmp_path / "all.jsonl", BIG, GRAND), "French")
    assert relations == [("grand", "synonym", "gros", "wiktionary")]
    assert report.dropped["Wiktionary entries of other languages"] == 1


def test_malformed_lines_are_skipped_counted_and_numbered(tmp_path, capsys):
    bad = [
        '{"word": "cut off',
        "[1, 2]",
        '{"lang": "English"}',
        '{"word": 3, "lang": "English"}',
        '{"word": "x"}',
        '{"word": "x", "lang": "English", "senses": "none"}',
        '{"word": "x", "lang": "English", "senses": ["none"]}',
        '{"word": "x", "lang": "English", "synonyms": {"word": "y"}}',
        '{"word": "\\ud800", "lang": "English"}',
        "[" * 100_000,
    ]
    path = _write(tmp_path / "english.jsonl", *[RUN] * 9, BIG, *bad)
    relations, report = _read(path)
    assert len(relations) == 6
    assert report.facts() == {str(path): {"lines": 10, "first": list(range(11, 21))}}
    printed = capsys.readouterr().err
    assert f"{path}: 10 of 20 lines are not entries of Wiktextract (line 11: it is not JSON" in printed
    assert "skipped lines: 11, 12, 13" in printed


def test_only_the_first_twenty_numbers_are_kept(tmp_path):
    path = _write(tmp_path / "english.jsonl", *["x"] * 30, *[RUN] * 40)
    _, report = _read(path)
    assert report.facts() == {str(path): {"lines": 30, "first": list(range(1, 21))}}


def test_a_file_of_mostly_malformed_lines_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"list\.txt: 2 of 3 lines are not entries .* a file of another format"):
        _read(_write(tmp_path / "list.txt", "big large", "small little", RUN))
    with pytest.raises(UserError, match="a file of another format"):  # one JSON value over many lines
        _read(_write(tmp_path / "array.json", json.dumps([BIG, RUN], indent=2)))


def test_another_language_edition_is_refused_with_the_languages_it_has(tmp_path):
    french = {"word": "grand", "lang": "Français", "senses": []}
    english = {"word": "big", "lang": "Anglais", "senses": []}
    with pytest.raises(UserError) as error:
        _read(_write(tmp_path / "fr.jsonl", french, english, french))
    for part in ("no entry has the language 'English'", "Français (2), Anglais (1)", "edition", "wiktionary_language"):
        assert part in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no entry in this file"):
        _read(_write(tmp_path / "empty.jsonl"))


def test_the_error_of_a_truncated_gzip_file_names_how_much_was_read(tmp_path):
    import random

    numbers = random.Random(0)  # what compresses badly, so that the cut is in the middle of the lines
    entries = [{"word": f"{numbers.random()}", "lang": "English"} for _ in range(20_000)]
    path = _write(tmp_path / "english.jsonl.gz", *entries)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(UserError) as error:
        _read(path)
    message = str(error.value)
    assert "ends early or is damaged" in message
    assert f"of its {len(data) * 3 // 4:,} bytes" in message
    lines = int(message.split("): ")[1].split(" ")[0].replace(",", ""))
    assert 5_000 < lines < 20_000
    path.write_bytes(data[:2000] + b"damage" + data[2006:])
    with pytest.raises(UserError, match="ends early or is damaged"):
        _read(path)


def test_a_file_named_gz_that_is_not_gzip_is_refused(tmp_path):
    path = tmp_path / "english.jsonl.gz"
    path.write_text(json.dumps(BIG))
    with pytest.raises(UserError, match=r"the name ends in \.gz, but this is not a gzip file"):
        _read(path)
