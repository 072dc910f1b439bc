"""Negation polarity, on words with obvious bases, and reading the workbook of MorphoLEX."""

import shutil
from pathlib import Path

import pytest
from openpyxl import Workbook

from dskd.config import LexiconConfig
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.lexicon.build import build_lexicon
from dskd.lexicon.morpholex import parse_segmentation, read_morpholex
from dskd.lexicon.negation import Base, find_negation
from dskd.lexicon.reading import MalformedError, Report
from dskd.lexicon.relations import Pairs, Relation, load_lexicon

AFFIXES = LexiconConfig.model_fields["negating_affixes"].default
SHARED = Path(__file__).parents[3] / "shared"
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
    "illegal": "<im<{(legal)}",  # MorphoLEX's label for the negating in-, im-, il- and ir-
    "visible": "{(vis)>able>}",
    "invisible": "{<im<(vis)>able>}",
    "noble": "{(noble)}",
    "ignoble": "<im<{(noble)}",
    "smoke": "{(smoke)}",
    "smokeless": "{(smoke)}>less>",
    "unsmokeless": "<un<{(smoke)}>less>",
    "fear": "{(fear)}",
    "fearlessly": "{(fear)>less>}>ly>",  # "less" is not a suffix of the whole word
    "predisposition": "{<pre<<dis<(pose)}>ition>",  # nor is dis its prefix: "preposition" is another word
    "preposition": "{<pre<(pose)}>ition>",
    "unsaid": "<un<{(sayd)}",  # no word without the prefix
    "return": "<re<{(turn)}",  # no negation
    "turn": "{(turn)}",
    "anti-war": "<anti<{(war)}",
    "war": "{(war)}",
    "income": "<in<{(come)}",  # in- here is "into", a- in alive is "on"
    "come": "{(come)}",
    "alive": "<a<{(live)}",
    "live": "{(live)}",
    "decrease": "{<de<(crease)}",  # down
    "crease": "{(crease)}",
    "dismiss": "<dis<{(miss)}",  # away
    "dismissal": "{<dis<(miss)}>al>",
    "miss": "{(miss)}",
    "missal": "{(miss)>al>}",
    "unused": "<un<{(use)}",  # "used" is known from the relations only
}


def _negation(words=WORDS, related=(), affixes=AFFIXES):
    return find_negation({word: parse_segmentation(text) for word, text in words.items()}, related, affixes)


def test_the_base_of_a_word_with_a_negating_affix():
    assert _negation().bases == {
        "unhappiness": Base("happiness", -1, "un"),
        "unhappy": Base("happy", -1, "un"),
        "dislike": Base("like", -1, "dis"),
        "penniless": Base("penny", -1, "less"),
        "illegal": Base("legal", -1, "im"),
        "invisible": Base("visible", -1, "im"),
        "ignoble": Base("noble", -1, "im"),
        "smokeless": Base("smoke", -1, "less"),
        "unsmokeless": Base("smoke", 1, "un+less"),  # its base is negated itself
    }
    assert _negation(related={"used"}).bases["unused"] == Base("used", -1, "un")


def test_the_negating_affixes_are_those_of_the_config():
    bases = _negation(affixes=["de-", "-less"]).bases
    assert set(bases) == {"penniless", "smokeless", "decrease"}
    assert _negation(affixes=["anti-"]).bases == {"anti-war": Base("war", -1, "anti")}


def test_a_word_known_only_with_a_capital_is_not_a_base():
    words = {"decline": "{<de<(cline)}", "cline": "{(cline)}", "unserious": "<un<{(serious)}", "serious": "{(serious)}"}
    assert set(_negation(words, {"Cline", "decline"}, ["un-", "de-"]).bases) == {"unserious"}
    assert _negation(words, {"Cline", "cline"}, ["un-", "de-"]).bases["decline"] == Base("cline", -1, "de")
    assert set(_negation(words, {"Serious", "serious"}, ["un-"]).bases) == {"unserious"}


def test_a_chain_of_negations_is_followed_to_its_end():
    words = {"un" * number: "<un<" * (number - 1) + "{(un)}" for number in range(1, 5)}
    bases = _negation(words).bases
    assert bases == {
        "unun": Base("un", -1, "un"),
        "ununun": Base("un", 1, "un+un"),
        "unununun": Base("un", -1, "un+un+un"),
    }
    assert _negation(dict(reversed(words.items()))).bases == bases


def test_polarities_multiply_and_every_flip_is_kept():
    negation = _negation()
    relations = [
        Relation("Unhappy", "sad", "synonym", "a"),
        Relation("unhappy", "penniless", "synonym", "b"),  # both negated: the relation stays
        Relation("dislike", "like", "antonym", "a"),
        Relation("unsmokeless", "sooty", "synonym", "a"),
        Relation("hot", "Cold", "antonym", "a"),
    ]
    assert list(negation.apply(relations)) == [
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
    assert negation.replaced == {"unhappy", "penniless", "dislike", "unsmokeless"}
    assert negation.facts() == {
        "flips": 4,
        "kept": 2,
        "bases": 4,
        "bases_by_affix": {"un": 1, "dis": 1, "less": 1, "un+less": 1},
    }


def test_pairs_that_replacing_makes_equal_or_contradictory_are_dropped():
    relations = [
        Relation("unhappy", "happy", "antonym", "a"),
        Relation("unhappy", "sad", "synonym", "a"),
        Relation("happy", "sad", "antonym", "a"),
        Relation("unhappy", "glad", "synonym", "a"),
        Relation("happy", "glad", "synonym", "b"),
    ]
    pairs = Pairs(_negation().apply(relations))
    assert [(r.head, r.relation, r.tail) for r in pairs.resolved()] == [
        ("happy", "antonym", "sad"),
        ("sad", "antonym", "happy"),
    ]
    assert dict(pairs.dropped) == {"self-pairs": 1, "repeated": 1, "contradictory pairs": 2}


def test_segmentations_are_parsed_morpheme_by_morpheme():
    assert parse_segmentation("{<un<(happy)}>ness>") == (
        ("prefix", "un"),
        ("root", "happy"),
        ("suffix", "ness"),
    )
    assert parse_segmentation("{<Non<<re<(new)>able>}")[:2] == (("prefix", "non"), ("prefix", "re"))
    assert parse_segmentation("{(black)}{(bird)}") == (("root", "black"), ("root", "bird"))


@pytest.mark.parametrize("text", ["", "happy", "<un<", "<un(happy)", "{(happy)>ness", "{(happy) }", "(ha(p)py)"])
def test_a_text_that_is_not_a_segmentation_is_malformed(text):
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


def test_a_git_lfs_pointer_is_refused_as_a_workbook(tmp_path):
    (tmp_path / "m.xlsx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="this is only a pointer of git"):
        read_morpholex(tmp_path / "m.xlsx", Report())


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
    assert found.words == {
        "happy": (("root", "happy"),),  # the first row of a word counts
        "true": (("root", "true"),),
        "unhappy": (("prefix", "un"), ("root", "happy")),
    }
    assert found.repeated == 1
    assert not report.malformed


def test_malformed_rows_are_skipped_and_numbered_by_sheet(tmp_path):
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
def test_a_file_that_is_not_a_workbook_is_refused(tmp_path, content):
    (tmp_path / "m.xlsx").write_bytes(content)
    with pytest.raises(UserError, match="this is not a workbook"):
        read_morpholex(tmp_path / "m.xlsx", Report())


def test_a_mostly_malformed_sheet_is_skipped_and_named_if_others_are_good(tmp_path, capsys):
    header, odd = ["Word", "MorphoLexSegm"], ["implicate", "{(<in<(plic)>ate>)}"]
    good = [header, ["happy", "{(happy)}"], ["unhappy", "<un<{(happy)}"]]
    path = _workbook(tmp_path / "m.xlsx", good=good, odd=[header, odd, ["few", "{(few)}"], odd])
    report = Report()
    assert set(read_morpholex(path, report).words) == {"happy", "unhappy"}  # no word of the odd sheet, not even "few"
    assert "m.xlsx[odd]: 2 of 3 lines are not words with a segmentation" in capsys.readouterr().err
    assert report.facts() == {f"{path}[odd]": {"lines": 2, "first": [2, 4]}}
    with pytest.raises(UserError, match=r"no sheet has words with a segmentation.*\n.*\[odd\]: 1 of 1 lines"):
        read_morpholex(_workbook(tmp_path / "x.xlsx", odd=[header, odd], other=[["Word"]]), Report())


@pytest.fixture(scope="module")
def real_words():
    """MorphoLEX's English words and segmentations, as far as they are well-formed."""
    table = SHARED / "data" / "morpholex" / "MorphoLEX_en.tsv"
    if not table.is_file():
        pytest.skip(f"{table} is not there")
    words = {}
    for line in table.read_text(encoding="utf-8").splitlines()[1:]:
        word, segmentation, _ = line.split("\t")
        try:
            words.setdefault(word.lower(), parse_segmentation(segmentation))
        except MalformedError:
            continue
    return words


def test_negations_of_the_real_morpholex(real_words):
    bases = find_negation(real_words, {"Cline"}, AFFIXES).bases
    for word in ("illegal", "illogical", "invisible", "inaccurate", "irregular", "immoral", "impossible", "ignoble"):
        assert bases[word].polarity == -1, word
        assert bases[word].word == word[2:]
    for word, base in (("unhappy", "happy"), ("dishonest", "honest"), ("nonviolent", "violent"), ("careless", "care")):
        assert (bases[word].word, bases[word].polarity) == (base, -1)
    no_negations = """import inside increase income input alive awake arise amount ashamed decrease decline deport
        depart describe impress inspire disappoint discount dismiss dispatch distract impair indifferent priceless
        regardless uncanny unravel infidel antibody disease discover display unless until under
        antitank antifreeze antithyroid anticlimax unripped unripping disgrace disgraced disgraceful disgorge
        inhumanities indelicacies indirection innumerable numberless countless unhorse unhorsed nonism"""
    assert not bases.keys() & set(no_negations.split())
    assert len(bases) > 1_500


@pytest.mark.parametrize("name", ["case.yaml", "case_onebadsheet.yaml"])
def test_opposites_that_share_no_negation_stay_antonyms(tmp_path, monkeypatch, name):
    case = SHARED / "cases" / "morpholex"
    if not case.is_dir():
        pytest.skip(f"{case} is not there")
    for file in case.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / name)
    build_lexicon(config)
    pairs = {(r.head, r.relation, r.tail) for r in load_lexicon(config) if r.head < r.tail}
    assert pairs == {
        ("export", "antonym", "import"),
        ("inside", "antonym", "outside"),
        ("alive", "antonym", "dead"),
        ("asleep", "antonym", "awake"),
        ("decrease", "antonym", "increase"),
        ("legal", "synonym", "licit"),
        ("unseen", "antonym", "visible"),
        ("regular", "antonym", "uneven"),
    }
