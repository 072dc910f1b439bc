"""Negation polarity, on words whose bases are plain to see; MorphoLEX as the workbook it is."""

import pytest
from openpyxl import Workbook

from dskd.errors import UserError
from dskd.lexicon.morpholex import parse_segmentation, read_morpholex
from dskd.lexicon.negation import Base, find_negation
from dskd.lexicon.reading import MalformedError, Report
from dskd.lexicon.relations import Relation, resolve

WORDS = {
    "happy": "{(happy)}",
    "happiness": "{(happy)}>ness>",
    "unhappiness": "{<un<(happy)}>ness>",
    "unhappy": "<un<{(happy)}",
    "like": "{(like)}",
    "dislike": "<dis<{(like)}",
    "penny": "{(penny)}",
    "penniless": "{(penny)}>less>",
    "legal": "{(legal)}",
    "illegal": "<in<{(legal)}",  # the letters are il: only the root is left
    "smoke": "{(smoke)}",
    "smokefree": "{(smoke)}>free>",
    "unsmokefree": "<un<{(smoke)}>free>",
    "fear": "{(fear)}",
    "fearlessly": "{(fear)>less>}>ly>",  # less is no suffix of the whole word
    "predisposition": "{<pre<<dis<(pose)}>ition>",  # nor is dis its prefix: "preposition" is another word
    "preposition": "{<pre<(pose)}>ition>",
    "detect": "<de<{(tect)}",  # no word
    "return": "<re<{(turn)}",  # no negation
    "turn": "{(turn)}",
    "anti-war": "<anti<{(war)}",
    "war": "{(war)}",
    "income": "<in<{(come)}",  # "come" is known from the relations only
}


def _negation(words=WORDS, known=()):
    return find_negation({word: parse_segmentation(text) for word, text in words.items()}, known)


def test_the_base_of_a_word_with_a_negating_affix():
    assert _negation().bases == {
        "unhappiness": Base("happiness", -1, "un"),
        "unhappy": Base("happy", -1, "un"),
        "dislike": Base("like", -1, "dis"),
        "penniless": Base("penny", -1, "less"),
        "illegal": Base("legal", -1, "in"),
        "smokefree": Base("smoke", -1, "free"),
        "unsmokefree": Base("smoke", 1, "un+free"),  # its base is negated itself
        "anti-war": Base("war", -1, "anti"),
    }
    assert _negation(known={"come"}).bases["income"] == Base("come", -1, "in")


def test_a_cycle_is_cut_and_counted():
    words = {
        "ab": "<un<{(cd)}",
        "cd": "<un<{(ef)}",
        "ef": "<un<{(ab)}",
        "unab": "<un<{(ab)}",
        "self": "<a<{(self)}",
        "gh": "<in<{(ij)}",
        "ij": "<in<{(gh)}",
    }
    negation = _negation(words)
    assert negation.cycles == 2
    assert negation.bases == {"unab": Base("ab", -1, "un")}
    assert _negation(dict(reversed(words.items()))).bases == negation.bases


def test_polarities_multiply_and_every_flip_is_kept():
    negation = _negation()
    given = [
        Relation("Unhappy", "sad", "synonym", "a"),
        Relation("unhappy", "penniless", "synonym", "b"),  # both negated: the relation stays
        Relation("dislike", "like", "antonym", "a"),
        Relation("unsmokefree", "sooty", "synonym", "a"),
        Relation("hot", "Cold", "antonym", "a"),
    ]
    assert list(negation.apply(given)) == [
        Relation("happy", "sad", "antonym", "a"),
        Relation("happy", "penny", "synonym", "b"),
        Relation("like", "like", "synonym", "a"),
        Relation("smoke", "sooty", "synonym", "a"),
        Relation("hot", "Cold", "antonym", "a"),
    ]
    assert {tuple(flip) for flip in negation.flips} == {
        ("Unhappy", "sad", "synonym", "a", "happy", "sad", "antonym"),
        ("sad", "Unhappy", "synonym", "a", "sad", "happy", "antonym"),
        ("dislike", "like", "antonym", "a", "like", "like", "synonym"),
        ("like", "dislike", "antonym", "a", "like", "like", "synonym"),
    }
    assert negation.acted == {"unhappy", "penniless", "dislike", "unsmokefree"}
    assert negation.facts() == {"flips": 4, "kept": 2, "bases": 4, "cycles": 0}


def test_what_replacing_makes_equal_or_contradictory_is_resolved():
    relations = [
        Relation("unhappy", "happy", "antonym", "a"),
        Relation("unhappy", "sad", "synonym", "a"),
        Relation("happy", "sad", "antonym", "a"),
        Relation("unhappy", "glad", "synonym", "a"),
        Relation("happy", "glad", "synonym", "b"),
    ]
    kept, dropped = resolve(_negation().apply(relations))
    assert [(r.head, r.relation, r.tail) for r in kept] == [("happy", "antonym", "sad"), ("sad", "antonym", "happy")]
    assert dict(dropped) == {"self-pairs": 1, "repeated": 1, "contradictory pairs": 2}


def test_segmentations_are_parsed_morpheme_by_morpheme():
    assert parse_segmentation("{<un<(happy)}>ness>").morphemes == (
        ("prefix", "un"),
        ("root", "happy"),
        ("suffix", "ness"),
    )
    assert parse_segmentation("{<Non<<re<(new)>able>}").of_kind("prefix") == ("non", "re")
    assert parse_segmentation("{(black)}{(bird)}").of_kind("root") == ("black", "bird")


@pytest.mark.parametrize("text", ["", "happy", "<un<", "<un(happy)", "{(happy)>ness", "{(happy) }", "(ha(p)py)"])
def test_what_is_no_segmentation_is_malformed(text):
    with pytest.raises(MalformedError):
        parse_segmentation(text)


def _workbook(path, **sheets):
    workbook = Workbook()
    workbook.remove(workbook.active)
    for title, rows in sheets.items():
        sheet = workbook.create_sheet(title)
        for row in rows:
            sheet.append(row)
    workbook.save(path)
    return path


def test_all_sheets_with_both_columns_are_read(tmp_path):
    path = _workbook(
        tmp_path / "morpholex.xlsx",
        Presentation=[["MorphoLEX, a database"], ["by its authors"]],
        a=[
            ["ELP_ItemID", "Word", "POS", "MorphoLexSegm"],
            [1, "Happy", "JJ", "{(happy)}"],
            [],
            [3, True, "JJ", "(true)"],
        ],
        b=[["MorphoLexSegm", "Word"], ["<un<{(happy)}", "unhappy"], ["{(happy)}>y>", "happy"]],
        prefixes=[["morpheme", "freq"], ["un", 3]],
    )
    report = Report()
    found = read_morpholex(path, report)
    assert {word: s.morphemes for word, s in found.words.items()} == {
        "happy": (("root", "happy"),),  # the first row of a word counts
        "true": (("root", "true"),),
        "unhappy": (("prefix", "un"), ("root", "happy")),
    }
    assert found.repeated == 1
    assert not report.malformed


def test_malformed_rows_are_left_out_and_numbered_by_sheet(tmp_path):
    good = [["big", "(big)"], ["small", "(small)"], ["hot", "(hot)"]]
    path = _workbook(
        tmp_path / "m.xlsx", a=[["Word", "MorphoLexSegm"], *good, [None, "(x)"], ["cold", None], ["odd", "<un<"]]
    )
    report = Report()
    assert set(read_morpholex(path, report).words) == {"big", "small", "hot"}
    assert report.facts() == {f"{path}[a]": {"lines": 3, "first": [5, 6, 7]}}


def test_a_workbook_without_the_columns_is_refused_with_what_it_has(tmp_path):
    path = _workbook(tmp_path / "x.xlsx", first=[["Word", "Freq"], ["a", 1]], second=[], third=[["MorphoLexSegm"]])
    with pytest.raises(UserError) as error:
        read_morpholex(path, Report())
    for part in ("no sheet has the columns Word and MorphoLexSegm", "first: Word, Freq", "second: empty", "third: Mor"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"", b"Word\tMorphoLexSegm\n", b"PK\x03\x04 not really", b"\xd0\xcf\x11\xe0" * 99])
def test_what_is_no_workbook_is_refused(tmp_path, content):
    (tmp_path / "m.xlsx").write_bytes(content)
    with pytest.raises(UserError, match="this is not a workbook"):
        read_morpholex(tmp_path / "m.xlsx", Report())


def test_a_base_is_spelled_as_the_relations_spell_it():
    words = {"un-american": parse_segmentation("<un<(american)"), "american": parse_segmentation("(american)")}
    negation = find_negation(words, {"American", "un-American"})
    (relation,) = negation.apply([Relation("American", "un-American", "antonym", "x")])
    assert relation == Relation("American", "American", "synonym", "x")  # a self-pair, which is dropped
