"""The items of lexical measures: words in WordNet's examples that no training text has."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from tiny_models import word_tokenizer
from tiny_wordnet import write_wordnet

from dskd.evaluation.lexical.contexts import read_contexts
from dskd.evaluation.lexical.items import make_items
from dskd.evaluation.lexical.preference import candidates_of
from dskd.evaluation.lexical.separation import lemmas_with_both
from dskd.evaluation.lexical.training_text import RUN_WORDS, count_phrases, is_new, runs_of, words_of
from dskd.lexicon.wordnet import open_wordnet

SYNSETS = [
    ("entity", "n", ["entity"], []),
    ("shore", "n", ["bank", "shore"], []),
    ("institute", "n", ["bank"], []),
    ("hot", "a", ["hot"], [("!", "cold", 1, 1), ("&", "torrid", 0, 0)]),
    ("cold", "a", ["cold"], [("!", "hot", 1, 1)]),
    ("torrid", "s", ["torrid", "scorching"], [("&", "hot", 0, 0)]),
]
GLOSSES = {
    "shore": 'land by water; "they sat on the bank"; "along both Banks of the river"; "banks of banks are two"',
    "institute": 'a firm; "he cashed a check at the bank"; "bank on it"; "the embankment is none"',
    "torrid": 'very hot; "a torrid day"; "the scorching sun burned us"',
    "cold": 'not hot; "it was a cold day"',
}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordnet") / "dict"
    write_wordnet(folder, SYNSETS, GLOSSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        yield open_wordnet(str(folder))


def test_a_word_counts_if_it_occurs_once_and_after_another_word(wordnet):
    found = {(c.lemma, c.part_of_speech, c.synset, c.text, c.word) for c in read_contexts(wordnet)}
    assert found == {
        ("bank", "n", "bank.n.01", "they sat on the bank", "bank"),
        ("bank", "n", "bank.n.01", "along both Banks of the river", "Banks"),
        ("bank", "n", "bank.n.02", "he cashed a check at the bank", "bank"),
        ("torrid", "a", "torrid.s.01", "a torrid day", "torrid"),
        ("scorching", "a", "torrid.s.01", "the scorching sun burned us", "scorching"),
        ("cold", "a", "cold.a.01", "it was a cold day", "cold"),
    }


def test_synonyms_and_antonyms_are_those_of_the_sense(wordnet):
    of = {c.lemma: (c.synonyms, c.antonyms) for c in read_contexts(wordnet)}
    assert of["bank"] == ((), ())  # the last: the institute
    assert of["torrid"] == (("hot", "scorching"), ("cold",))  # cold by way of hot
    assert of["cold"] == ((), ("hot",))


def test_replacements_must_fit_the_sentence(wordnet):
    pairs = {c.text: candidates_of(c) for c in read_contexts(wordnet)}
    assert pairs["a torrid day"] == [("hot", "cold"), ("scorching", "cold")]
    assert pairs["the scorching sun burned us"] == [("hot", "cold"), ("torrid", "cold")]
    assert pairs["along both Banks of the river"] == []


def test_replacements_fit_the_article_and_do_not_occur_in_the_sentence(wordnet):
    torrid = next(c for c in read_contexts(wordnet) if c.text == "a torrid day")
    assert candidates_of(replace(torrid, synonyms=("arid", "hot"))) == [("hot", "cold")]
    an = replace(torrid, text="an arid day", lemma="arid", start=3, stop=7, synonyms=("icy", "hot"), antonyms=("odd",))
    assert candidates_of(an) == [("icy", "odd")]
    assert candidates_of(replace(torrid, text="a torrid cold day")) == []


def test_phrases_are_counted_as_a_loop_counts_them():
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdef", k=draw.randrange(40))) for _ in range(200)]
    expected = Counter(
        tuple(words[start : start + length])
        for words in map(str.split, texts)
        for length in (1, 2, 3, 7)
        for start in range(len(words) - length + 1)
    )
    phrases = {tuple(draw.choices("abcdefg", k=length)) for length in (1, 2, 3, 7) for _ in range(400)}
    found = count_phrases(texts, phrases)
    assert found == {phrase: expected[phrase] for phrase in phrases}
    assert sum(count > 0 for count in found.values()) > 200
    assert sum(count == 0 for count in found.values()) > 50
    assert count_phrases([], [("a",)]) == {("a",): 0}


def test_a_sentence_is_known_by_its_words_in_any_case_and_punctuation():
    long = "one two three four five six seven eight nine ten"
    assert len(runs_of(long)) == 10 - RUN_WORDS + 1
    for text, known in [
        ("They sat, on the BANK!", True),
        ("they sat on the bank today", False),
        ("a sentence of other words", False),
        (f"before {long}", True),
        ("three four five six seven eight nine ten and new words", True),
        ("four five six seven eight nine ten and new words", False),
    ]:
        counts = count_phrases([f"X: they sat on the bank. {long}.", "he"], runs_of(text))
        assert is_new(text, counts) is not known, text
    assert words_of("The dog's 2nd-best — “bone”") == ("the", "dog's", "2nd", "best", "bone")


def test_no_item_is_in_the_training_text(wordnet):
    texts = ["bank: land by water. They sat on the bank.", "hot cold torrid scorching hot cold"]
    words = sorted({word for c in read_contexts(wordnet) for word in (*c.text.split(), "hot", "they")})
    items, facts = make_items(wordnet, texts, word_tokenizer(words), [], [])
    assert [c.text for c in items.contexts] == ["along both Banks of the river", "he cashed a check at the bank"]
    assert (facts["examples"], facts["held_out_examples"], facts["of_both_kinds"]) == (6, 5, 0)
    assert [choice.name.rsplit("/")[1:4] for choice in items.choices] == [
        ["scorching", "hot", "cold"],
        ["torrid", "hot", "cold"],
    ]  # hot, not torrid: it is as frequent as cold
    everything, _ = make_items(wordnet, ["hot cold"], word_tokenizer(words), [], [])
    assert len(everything.contexts) == 3
    assert list(lemmas_with_both(everything.contexts)) == ["bank.n"]
    assert make_items(wordnet, ["hot", "cold"] + 2 * ["cold"], word_tokenizer(words), [], [])[0].choices != []
    assert make_items(wordnet, ["hot"] + 4 * ["cold"], word_tokenizer(words), [], [])[0].choices == []
    assert make_items(wordnet, ["hot"], word_tokenizer(words), [], [])[0].choices == []
