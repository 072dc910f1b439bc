"""Relations of a WordNet of ten synsets, and of a language of Open Multilingual WordNet, in their own formats."""

import shutil

import pytest
from tiny_wordnet import write_wordnet

from dskd.artifacts.manifest import read_manifest
from dskd.config import Config, LexiconConfig
from dskd.errors import UserError
from dskd.lexicon.build import build_lexicon, read_sources, recipe
from dskd.lexicon.languages import find_language
from dskd.lexicon.reading import Report
from dskd.lexicon.relations import load_lexicon
from dskd.lexicon.wordnet import open_wordnet
from dskd.lexicon.wordnet_relations import read_indirect_antonyms, read_other_language, read_wordnet


@pytest.fixture
def tiny_wordnet(monkeypatch, tmp_path):
    """The offsets of its synsets. It is in `tmp_path / "dict"`; nltk's only data folder is `tmp_path / "nltk"`."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_wordnet.cache_clear()
    yield write_wordnet(tmp_path / "dict")
    open_wordnet.cache_clear()


def _open(tmp_path):
    return open_wordnet(str(tmp_path / "dict"))


def _both(*pairs):
    return {pair for head, tail in pairs for pair in ((head, tail), (tail, head))}


def _of(relations, kind):
    return {(r.head, r.tail) for r in relations if r.relation == kind}


def _write_french(tmp_path, offsets, extra=(), package="omw-1.4"):
    folder = tmp_path / "nltk" / "corpora" / package / "fra"
    folder.mkdir(parents=True)
    lines = [
        "# WOLF\tfra\thttp://example.org/\tCeCILL-C",
        f"{offsets['car']}\tfra:lemma\tvoiture",
        f"{offsets['car']}\tfra:lemma\tautomobile",
        f"{offsets['car']}\tfra:lemma\tvoiture_de_tourisme",
        f"{offsets['car']}\tfra:def\t0\tun véhicule",
        f"{offsets['hot']}\tlemma\tchaud",
        f"{offsets['cold']}\tfra:lemma\tfroid",
        f"{offsets['scorching'].replace('-s', '-a')}\tfra:lemma\tbrûlant",
        f"{offsets['torrid'].replace('-s', '-a')}\tfra:lemma\tbrûlant",
        f"{offsets['torrid'].replace('-s', '-a')}\tfra:lemma\ttorride",
        *extra,
    ]
    (folder / "wn-data-fra.tab").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder.parent


def test_wordnets_synonyms_and_direct_antonyms(tiny_wordnet, tmp_path):
    relations = list(read_wordnet(_open(tmp_path)))
    assert {r.source for r in relations} == {"wordnet"}
    assert _of(relations, "synonym") == _both(
        ("car", "auto"),
        ("car", "motor car"),  # an underscore is a space
        ("auto", "motor car"),
        ("torrid", "hot"),
        ("large", "big"),
        ("small", "little"),
        ("huge", "galore"),  # "(ip)" is syntax
    )
    assert _of(relations, "antonym") == _both(("hot", "cold"), ("large", "small"), ("big", "little"))


def test_indirect_antonyms_go_from_satellites_to_the_antonyms_of_their_heads(tiny_wordnet, tmp_path):
    relations = list(read_indirect_antonyms(_open(tmp_path)))
    assert {(r.relation, r.source) for r in relations} == {("antonym", "wordnet-indirect")}
    assert {(r.head, r.tail) for r in relations} == {
        ("scorching", "cold"),
        ("torrid", "cold"),  # hot and cold are direct antonyms, so that pair is not here
        ("frigid", "hot"),
        ("huge", "small"),
        ("huge", "little"),
        ("galore", "small"),
        ("galore", "little"),
    }


def test_another_language_has_the_synonyms_of_its_lemmas_and_the_antonyms_of_its_synsets(tiny_wordnet, tmp_path):
    _write_french(tmp_path, tiny_wordnet)
    report = Report()
    relations = list(read_other_language(_open(tmp_path), "fra", report))
    assert {r.source for r in relations} == {"wordnet:fra"}
    assert _of(relations, "synonym") == _both(
        ("voiture", "automobile"),
        ("voiture", "voiture de tourisme"),
        ("automobile", "voiture de tourisme"),
        ("brûlant", "torride"),  # satellites; the file calls them adjectives
    )
    assert _of(relations, "antonym") == _both(("chaud", "froid"))
    assert not report.malformed


def test_malformed_lines_of_a_language_are_skipped_and_numbered(tiny_wordnet, tmp_path):
    extra = [f"{tiny_wordnet['car']}\tfra:lemma", "car\tfra:lemma\tauto", "99999999-n\tfra:lemma\trien"]
    path = _write_french(tmp_path, tiny_wordnet, extra) / "fra" / "wn-data-fra.tab"
    report = Report()
    words = {r.head for r in read_other_language(_open(tmp_path), "fra", report)}
    assert report.facts() == {str(path): {"lines": 3, "first": [11, 12, 13]}}
    assert not words & {"auto", "rien"}


def test_a_wordnet_with_other_offsets_is_refused_by_its_name(tiny_wordnet, tmp_path):
    path = _write_french(tmp_path, tiny_wordnet, ["00613018-v\tfra:lemma\toublier", "00607780-v\tfra:lemma\tretenir"])
    with pytest.raises(UserError) as error:
        list(read_other_language(_open(tmp_path), "fra", Report()))
    message = str(error.value)
    for part in (
        f"the WordNet in {tmp_path / 'dict'} is not the one",
        f"2 of 2 verb lines of {path / 'fra' / 'wn-data-fra.tab'}",
        "python -m nltk.downloader wordnet",
        "wordnet.path",
    ):
        assert part in message


def test_a_language_that_does_not_fit_is_refused_before_english_is_read(tiny_wordnet, tmp_path):
    _write_french(tmp_path, tiny_wordnet, ["00613018-v\tfra:lemma\toublier"])
    config = LexiconConfig(languages=("eng", "fra"))
    with pytest.raises(UserError, match="is not the one"):
        next(read_sources(config, str(tmp_path / "dict"), Report()))


def test_joints_and_gaps_of_open_multilingual_wordnet_are_removed(tiny_wordnet, tmp_path):
    lines = [
        f"{tiny_wordnet['large']}\tcmn:lemma\t大+的",
        f"{tiny_wordnet['large']}\tcmn:lemma\t巨大+的",
        f"{tiny_wordnet['large']}\tcmn:lemma\tC++",
        f"{tiny_wordnet['small']}\tcmn:lemma\t+小",
        f"{tiny_wordnet['car']}\tcmn:lemma\tGAP!",
        f"{tiny_wordnet['car']}\tcmn:lemma\t汽车",
    ]
    folder = tmp_path / "nltk" / "corpora" / "omw-1.4" / "cmn"
    folder.mkdir(parents=True)
    (folder / "wn-data-cmn.tab").write_text("\n".join(lines), encoding="utf-8")
    report = Report()
    relations = list(read_other_language(_open(tmp_path), "cmn", report))
    assert _of(relations, "synonym") == _both(("大的", "巨大的"), ("大的", "C++"), ("巨大的", "C++"))
    assert ("大的", "小") in _of(relations, "antonym")
    assert report.dropped["gaps of Open Multilingual WordNet"] == 1


def test_the_package_may_be_zipped(tiny_wordnet, tmp_path):
    package = _write_french(tmp_path, tiny_wordnet, package="omw-2.0")
    shutil.make_archive(str(package), "zip", package.parent, package.name)
    shutil.rmtree(package)
    relations = list(read_other_language(_open(tmp_path), "fra", Report()))
    assert ("chaud", "froid") in _of(relations, "antonym")


def test_a_missing_language_is_refused_with_the_ways_to_get_it(tiny_wordnet, tmp_path):
    with pytest.raises(UserError) as error:
        list(read_other_language(_open(tmp_path), "fra", Report()))
    for way in ("python -m nltk.downloader omw-1.4", "NLTK_DATA", "lexicon.languages=[eng]"):
        assert way in str(error.value)
    _write_french(tmp_path, tiny_wordnet)
    with pytest.raises(UserError, match="has no 'ita'; it has fra"):
        list(read_other_language(_open(tmp_path), "ita", Report()))


def test_synsets_of_another_wordnet_are_refused(tiny_wordnet, tmp_path):
    _write_french(tmp_path, tiny_wordnet)
    data = tmp_path / "dict" / "data.adj"
    data.write_text(data.read_text().replace("WordNet 3.0", "WordNet 3.1"))
    with pytest.raises(UserError, match=r"names synsets of WordNet 3\.0, but .* is WordNet 3\.1"):
        list(read_other_language(_open(tmp_path), "fra", Report()))


def test_the_stage_names_each_wordnet_as_a_source(tiny_wordnet, tmp_path):
    path = _write_french(tmp_path, tiny_wordnet) / "fra" / "wn-data-fra.tab"
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": "unused"},
        wordnet={"path": str(tmp_path / "dict")},
        lexicon={"languages": ("eng", "fra"), "indirect_antonyms": True},
    )
    build_lexicon(config)
    facts = read_manifest(config.path("lexicon"), "lexicon", made_by="").facts
    assert facts["pairs_by_source"] == {
        "wordnet": {"synonym": 14, "antonym": 6},
        "wordnet-indirect": {"synonym": 0, "antonym": 14},
        "wordnet:fra": {"synonym": 8, "antonym": 2},
    }
    assert {relation.source for relation in load_lexicon(config)} == set(facts["pairs_by_source"])
    before = recipe(config)
    path.write_text(path.read_text(encoding="utf-8").replace("torride", "tropical"), encoding="utf-8")
    assert recipe(config) != before
    assert find_language("fra")[0] == str(path)
