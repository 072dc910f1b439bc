"""Dict2Vec's lists, users' own lists, rules for all text files, and the stage over all sources together."""

import gzip
import json
import os
import re

import pyarrow.parquet as pq
import pytest
from config_files import write_config
from openpyxl import Workbook

from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.lexicon import reading
from dskd.lexicon.build import build_lexicon, recipe
from dskd.lexicon.dict2vec import read_dict2vec
from dskd.lexicon.reading import Report, stream_lines
from dskd.lexicon.relations import load_lexicon
from dskd.lexicon.tsv import read_tsv
from dskd.lexicon.wiktionary import read_wiktionary


def _config(tmp_path, **lexicon):
    return Config(workdir=str(tmp_path / "work"), teacher={"path": "x"}, lexicon={"wordnet": False, **lexicon})


def test_dict2vec_has_two_synonyms_a_line(tmp_path):
    path = tmp_path / "strong-pairs.txt"
    path.write_text("car automobile\ncar  vehicle\r\n\nbig\tlarge\n", encoding="utf-8")
    report = Report()
    assert [tuple(relation) for relation in read_dict2vec(path, report)] == [
        ("car", "automobile", "synonym", "dict2vec"),
        ("car", "vehicle", "synonym", "dict2vec"),
        ("big", "large", "synonym", "dict2vec"),
    ]
    assert not report.malformed


def test_malformed_lines_of_dict2vec_are_skipped_and_numbered(tmp_path, capsys):
    path = tmp_path / "pairs.txt"
    path.write_text("car automobile\ncar\nbig large\nbig very large\nsmall little\n", encoding="utf-8")
    report = Report()
    assert len(list(read_dict2vec(path, report))) == 3
    assert report.facts() == {str(path): {"lines": 2, "first": [2, 4]}}
    assert "2 of 5 lines are not two words" in capsys.readouterr().err


def test_a_file_of_other_lines_is_refused_as_dict2vec(tmp_path):
    path = tmp_path / "own.tsv"
    path.write_text("big\tsynonym\tlarge\nhot\tantonym\tcold\n", encoding="utf-8")
    with pytest.raises(UserError, match="a file of another format"):
        list(read_dict2vec(path, Report()))


READERS = {
    "wiktionary": lambda path: list(read_wiktionary(path, "English", Report())),
    "dict2vec": lambda path: list(read_dict2vec(path, Report())),
    "tsv": lambda path: list(read_tsv(path, path.name, Report())),
}


@pytest.mark.parametrize("source", READERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\x00\x01\n", r"file:1: this is a binary file"),
        (b"caf\xe9 bistro\n", r"file:1: this is not UTF-8 text .* byte 4 of the line"),
        (gzip.compress(b"\x00\x01\x02", mtime=0), r"file:1: this is a binary file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"file: this is only a pointer of git"),
        (gzip.compress(b"big large\n" * 999, mtime=0)[:-9], r"file: the gzip file ends early"),
    ],
)
def test_a_binary_file_is_refused_by_every_reader(tmp_path, source, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        READERS[source](tmp_path / "file")


def test_lines_that_are_not_text_are_skipped_in_files_of_other_people(tmp_path):
    (tmp_path / "file").write_bytes(b"big large\ncaf\xe9 bistro\nfew some\na\x00b c\nhot warm\n")
    report = Report()
    found = [relation.head for relation in read_dict2vec(tmp_path / "file", report)]
    assert found == ["big", "few", "hot"]
    assert report.facts() == {str(tmp_path / "file"): {"lines": 2, "first": [2, 4]}}
    (tmp_path / "own.tsv").write_bytes(b"big\tsynonym\tlarge\ncaf\xe9\tsynonym\tbistro\n")
    with pytest.raises(UserError, match=r"own\.tsv:2: this is not UTF-8 text"):
        READERS["tsv"](tmp_path / "own.tsv")


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1000)
    (tmp_path / "file").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="this line is longer than 1,000 bytes"):
        list(stream_lines(tmp_path / "file"))


def test_a_byte_order_mark_is_not_part_of_the_first_word(tmp_path):
    (tmp_path / "pairs.txt").write_bytes(b"\xef\xbb\xbfbig large\n")
    assert next(read_dict2vec(tmp_path / "pairs.txt", Report())).head == "big"


@pytest.fixture
def sources(tmp_path):
    """A file of every kind of source that needs one."""
    (tmp_path / "own.tsv").write_text("happy\tantonym\tsad\nbig\tsynonym\tlarge\n", encoding="utf-8")
    (tmp_path / "pairs.txt").write_text("big large\nunhappy sad\nbig\nfew some\n", encoding="utf-8")
    entry = {
        "word": "happy",
        "lang": "English",
        "senses": [{"synonyms": [{"word": "glad"}], "antonyms": [{"word": "unhappy"}]}],
    }
    (tmp_path / "w.jsonl.gz").write_bytes(gzip.compress(json.dumps(entry).encode()))
    workbook = Workbook()
    workbook.active.append(["Word", "POS", "MorphoLexSegm"])
    workbook.active.append(["unhappy", "JJ", "<un<{(happy)}"])
    workbook.save(tmp_path / "morpholex.xlsx")
    return {
        "wiktionary": (str(tmp_path / "w.jsonl.gz"),),
        "dict2vec": (str(tmp_path / "pairs.txt"),),
        "tsv": (str(tmp_path / "own.tsv"),),
    }


def test_relations_of_all_sources_name_their_source(tmp_path, sources):
    config = _config(tmp_path, **sources)
    build_lexicon(config)
    relations = {(r.head, r.relation, r.tail, r.source) for r in load_lexicon(config) if r.head < r.tail}
    assert relations == {
        ("big", "synonym", "large", "dict2vec"),
        ("big", "synonym", "large", "own.tsv"),
        ("sad", "synonym", "unhappy", "dict2vec"),
        ("few", "synonym", "some", "dict2vec"),
        ("happy", "antonym", "sad", "own.tsv"),
        ("glad", "synonym", "happy", "wiktionary"),
        ("happy", "antonym", "unhappy", "wiktionary"),
    }
    facts = read_manifest(config.path("lexicon"), "lexicon", made_by="").facts
    assert facts["pairs"] == {"synonym": 8, "antonym": 4}  # big and large count once
    assert facts["pairs_by_source"] == {
        "dict2vec": {"synonym": 6, "antonym": 0},
        "own.tsv": {"synonym": 2, "antonym": 2},
        "wiktionary": {"synonym": 2, "antonym": 2},
    }
    assert facts["dropped"]["self-pairs"] == 0
    assert facts["malformed"] == {str(tmp_path / "pairs.txt"): {"lines": 1, "first": [3]}}
    assert sorted(path.name for path in config.path("lexicon").iterdir()) == ["manifest.json", "relations.parquet"]


def test_the_stage_replaces_negated_words_and_records_the_changes(tmp_path, sources):
    config = _config(tmp_path, **sources, morpholex=str(tmp_path / "morpholex.xlsx"))
    build_lexicon(config)
    relations = {(r.head, r.relation, r.tail, r.source) for r in load_lexicon(config) if r.head < r.tail}
    assert relations == {
        ("big", "synonym", "large", "dict2vec"),
        ("big", "synonym", "large", "own.tsv"),
        ("few", "synonym", "some", "dict2vec"),
        ("happy", "antonym", "sad", "dict2vec"),  # unhappy and sad were synonyms
        ("happy", "antonym", "sad", "own.tsv"),
        ("glad", "synonym", "happy", "wiktionary"),
    }
    folder = config.path("lexicon")
    flips = pq.read_table(folder / "flips.parquet").to_pylist()
    assert [tuple(flip.values()) for flip in flips] == [
        ("happy", "unhappy", "antonym", "wiktionary", "happy", "happy", "synonym"),
        ("sad", "unhappy", "synonym", "dict2vec", "sad", "happy", "antonym"),
        ("unhappy", "happy", "antonym", "wiktionary", "happy", "happy", "synonym"),
        ("unhappy", "sad", "synonym", "dict2vec", "happy", "sad", "antonym"),
    ]
    assert pq.read_table(folder / "bases.parquet").to_pylist() == [
        {"word": "unhappy", "base": "happy", "polarity": -1, "affix": "un"}
    ]
    facts = read_manifest(folder, "lexicon", made_by="").facts
    assert facts["dropped"]["self-pairs"] == 1  # happy and unhappy
    assert facts["negation"] == {
        "morpholex_words": 1,
        "morpholex_repeated": 0,
        "flips": 4,
        "kept": 0,
        "bases": 1,
        "bases_by_affix": {"un": 1},
        "words_before": 8,
        "words_gone": 1,
    }


def test_the_recipe_follows_every_file(tmp_path, sources):
    config = _config(tmp_path, **sources, morpholex=str(tmp_path / "morpholex.xlsx"))
    build_lexicon(config)
    before = recipe(config)
    assert is_current(config.path("lexicon"), before)
    os.utime(tmp_path / "own.tsv")  # a list of the user's own counts by its content
    assert recipe(config) == before
    for name in ("own.tsv", "pairs.txt", "w.jsonl.gz", "morpholex.xlsx"):
        before = recipe(config)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\n")
        assert recipe(config) != before, name
    assert not is_current(config.path("lexicon"), recipe(config))


def test_every_missing_file_is_named_with_its_key(tmp_path):
    config = _config(
        tmp_path, wiktionary=("a.jsonl",), dict2vec=("b.txt",), tsv=("c.tsv", "d.tsv"), morpholex=str(tmp_path)
    )
    with pytest.raises(UserError) as error:
        recipe(config)
    message = str(error.value)
    for part in ("lexicon.wiktionary: a.jsonl is not a file", "lexicon.dict2vec: b.txt is not a file"):
        assert part in message
    for part in ("lexicon.tsv: c.tsv is not a file", "lexicon.tsv: d.tsv is not a file", "lexicon.morpholex: "):
        assert part in message


def test_a_refused_source_leaves_nothing(tmp_path):
    (tmp_path / "fr.jsonl").write_text('{"word": "grand", "lang": "Français"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="edition of Wiktionary"):
        build_lexicon(_config(tmp_path, wiktionary=(str(tmp_path / "fr.jsonl"),)))
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("lexicon", "message"),
    [
        ("{wordnet: false}", "no source of relations"),
        ("{wordnet: false, tsv: [x], languages: [fra]}", "languages are those of WordNet"),
        ("{languages: [fra], indirect_antonyms: true}", "indirect_antonyms come from WordNet in English"),
        ("{languages: [french]}", r"lexicon\.languages"),
        ("{languages: []}", r"lexicon\.languages"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, lexicon, message):
    write_config(tmp_path / "c.yaml", f"workdir: w\nteacher: {{path: x}}\nlexicon: {lexicon}\n")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert re.search(message, str(error.value))
