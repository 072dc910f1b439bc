from itertools import islice

import pyarrow.parquet as pq
import pytest
from wordnet_files import pairs as read_pairs
from wordnet_files import read_synsets

from dskd.errors import UserError
from dskd.lexicon.reading import Report
from dskd.lexicon.relations import SCHEMA, Pairs, Relation, write_relations
from dskd.lexicon.tsv import read_tsv
from dskd.lexicon.wordnet import open_wordnet
from dskd.lexicon.wordnet_relations import read_wordnet


def _pairs(relations):
    return {(r.head, r.relation, r.tail) for r in relations}


def test_relations_are_symmetric_and_free_of_self_pairs_repeats_and_contradictions():
    pairs = Pairs(
        [
            Relation("big", "large", "synonym", "a"),
            Relation("large", "big", "synonym", "a"),
            Relation("big", "large", "synonym", "a"),
            Relation("big", "large", "synonym", "b"),
            Relation("big", "big", "synonym", "a"),
            Relation("king", "queen", "synonym", "a"),
            Relation("queen", "king", "antonym", "b"),
            Relation("hot", "cold", "antonym", "a"),
        ]
    )
    kept, dropped = pairs.resolved(), pairs.dropped
    assert _pairs(kept) == {
        ("big", "synonym", "large"),
        ("large", "synonym", "big"),
        ("hot", "antonym", "cold"),
        ("cold", "antonym", "hot"),
    }
    assert [r.source for r in kept if r.head == "big"] == ["a", "b"]  # both sources stay visible
    assert dict(dropped) == {"self-pairs": 1, "contradictory pairs": 2, "repeated": 1}


def test_the_table_has_the_documented_columns(tmp_path):
    write_relations(tmp_path / "relations.parquet", [Relation("big", "large", "synonym", "test")])
    table = pq.read_table(tmp_path / "relations.parquet")
    assert table.schema.equals(SCHEMA)
    assert table.column_names == ["head", "tail", "relation", "source"]
    assert table.to_pylist() == [{"head": "big", "tail": "large", "relation": "synonym", "source": "test"}]


def test_tsv_is_read_with_comments_and_empty_lines(tmp_path):
    path = tmp_path / "own.tsv"
    path.write_text("\ufeff# a comment\nbig\tsynonym\tvery large\n\nbig\tantonym\tsmall\n", encoding="utf-8")
    assert _pairs(read_tsv(path, path.name, Report())) == {
        ("big", "synonym", "very large"),
        ("big", "antonym", "small"),
    }


def test_every_bad_line_of_a_tsv_is_named(tmp_path):
    path = tmp_path / "own.tsv"
    path.write_text("big\tsynonym\tlarge\nbig\tsynonim\thuge\nbig\tlarge\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(read_tsv(path, path.name, Report()))
    message = str(error.value)
    assert f"{path}:2: the relation must be synonym or antonym, found 'synonim'" in message
    assert f"{path}:3: expected head<TAB>synonym|antonym<TAB>tail" in message
    assert f"{path}:1" not in message


def test_a_binary_tsv_is_refused(tmp_path):
    path = tmp_path / "own.tsv"
    path.write_bytes(b"\x80\x81\xff\x00")
    with pytest.raises(UserError, match="is a binary file"):
        list(read_tsv(path, path.name, Report()))


def test_wordnet_gives_the_relations_of_its_dictionary_files(monkeypatch):
    """Of a part of each: nltk takes half a minute for all. All of the adjectives named below are in their part."""
    wordnet = open_wordnet()
    all_synsets = wordnet.reader.all_synsets
    read = [
        s
        for part, count in (("n", 1500), ("v", 1500), ("a", 7000), ("r", 1000))
        for s in islice(all_synsets(part), count)
    ]
    monkeypatch.setattr(wordnet.reader, "all_synsets", lambda _: iter(read))
    relations = list(read_wordnet(wordnet))
    places = [("a" if synset.pos() == "s" else synset.pos(), f"{synset.offset():08}") for synset in read]
    assert {(r.head, r.tail, r.relation) for r in relations} == set(read_pairs(read_synsets(wordnet.folder), places))
    of_wordnet = Pairs(relations)
    pairs = _pairs(of_wordnet.resolved())
    assert {
        ("happy", "antonym", "unhappy"),
        ("unhappy", "antonym", "happy"),
        ("hot", "antonym", "cold"),
    } <= pairs
    assert not {(h, t) for h, r, t in pairs if r == "synonym"} & {(h, t) for h, r, t in pairs if r == "antonym"}
    assert all("_" not in head and "(" not in head for head, _, _ in pairs)
    assert any(" " in head for head, _, _ in pairs)
    assert of_wordnet.dropped["contradictory pairs"] > 0
