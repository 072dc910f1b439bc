"""Which of the teacher's texts become documents, and why others do not."""

import pyarrow.parquet as pq
import pytest
from tiny_wordnet import write_wordnet

from dskd.corpus.written import judging
from dskd.corpus.written.judging import (
    KEPT,
    NO_SENTENCE,
    REFUSAL,
    REPEATS,
    TOO_SHORT,
    WITHOUT_WORD,
    Judged,
    documents_of,
    judge,
    repeated_share,
    whole_sentences,
    without_announcement,
    write_senses,
)
from dskd.lexicon.wordnet import open_wordnet


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("One sentence. Another one.", "One sentence. Another one."),
        ("  One sentence. And the rest of", "One sentence."),
        ("No end at all", ""),
        ("", ""),
        ('He said: "It is hot!" Then he', 'He said: "It is hot!"'),
        ("It costs 3.5 dollars, or", ""),
        ("Is it? (Yes.) Perhaps", "Is it? (Yes.)"),
        ("Well… he", "Well…"),
        ("*A title.*\n\nThe text. More", "*A title.*\n\nThe text."),
    ],
)
def test_a_text_is_cut_after_its_last_whole_sentence(text, cut):
    assert whole_sentences(text) == cut


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('Sure! Here is a text with the word "hot":\n\nIt was hot.', "It was hot."),
        ('Sure! Here is a text with the word "hot": It was hot.', "It was hot."),
        ("Certainly, here’s a short paragraph:\nIt was hot.", "It was hot."),
        ("**A hot day:**\n\nIt was hot.", "It was hot."),
        ("He had one wish: water. It was hot.", "He had one wish: water. It was hot."),
        ("It was hot. He asked:\n- for water\n- for ice", "It was hot. He asked:\n- for water\n- for ice"),
        ('Here is a text with the word "hot":', 'Here is a text with the word "hot":'),
        ("It was hot.\nHe said: go.", "It was hot.\nHe said: go."),
    ],
)
def test_the_announcement_of_a_text_is_not_part_of_it(text, rest):
    assert without_announcement(text) == rest


def test_repetition_is_the_share_of_word_groups_that_came_before():
    assert repeated_share(["a", "b", "c", "d", "e"]) == 0
    assert repeated_share(["a", "b", "c", "a", "b", "c"]) == 1 / 4  # abc bca cab abc
    assert repeated_share(["a", "b"]) == 0
    assert repeated_share(["hot"] * 10) == 7 / 8


def _lemmas(form, part_of_speech):
    return {("running", "v"): {"run"}, ("rivers", "n"): {"river"}}.get((form, part_of_speech), {form})


@pytest.mark.parametrize(
    ("text", "word", "part", "outcome"),
    [
        ("The river was cold in spring.", "river", "n", KEPT),
        ("The RIVER was cold in spring.", "river", "n", KEPT),
        ("Rivers were cold in early spring.", "river", "n", KEPT),
        ("He was running to the station.", "run", "v", KEPT),
        ("He was running to the station.", "run", "n", WITHOUT_WORD),
        ("The riverside was cold in spring.", "river", "n", WITHOUT_WORD),
        ("We learn c++ in the first year.", "c++", "n", KEPT),
        ("The river-bed was dry that year.", "river", "n", KEPT),
        ("A cold river.", "river", "n", TOO_SHORT),
        ("", "river", "n", NO_SENTENCE),
        ("...", "river", "n", NO_SENTENCE),
        ("A river is a river is a river is a river.", "river", "n", REPEATS),
        ("I'm sorry, but I cannot write a text with the word river.", "river", "n", REFUSAL),
        ("I’m sorry.", "river", "n", REFUSAL),
        ("As an AI language model, I have never seen a river.", "river", "n", REFUSAL),
        ("Unfortunately, I can't provide a text about a river.", "river", "n", REFUSAL),
        ("I am not able to assist with the word river.", "river", "n", REFUSAL),
        ("I can't believe how cold the river is today.", "river", "n", KEPT),
        ("As an aid to sailors, the river has lights.", "river", "n", KEPT),
        ('"I\'m sorry," he said, and went back to the river.', "river", "n", KEPT),
    ],
)
def test_outcomes(text, word, part, outcome):
    assert judge(text, word, part, _lemmas) == outcome


def test_forms_are_those_of_wordnets_morphology(tmp_path):
    lemmas_of = judging._lemmas(open_wordnet().reader)
    for form, part, lemma in [
        ("found", "v", "find"),
        ("found", "v", "found"),
        ("leaves", "n", "leaf"),
        ("leaves", "n", "leave"),
        ("hotter", "s", "hot"),
        ("went", "v", "go"),
        ("better", "a", "good"),
    ]:
        assert lemma in lemmas_of(form, part), form
    assert "find" not in lemmas_of("found", "n")
    write_wordnet(tmp_path / "wordnet")
    assert judging._lemmas(open_wordnet(str(tmp_path / "wordnet")).reader)("cars", "n") == {"car"}


def test_a_sense_has_text_if_one_of_its_texts_is_kept(tmp_path):
    judged = [
        Judged("bank", "bank.n.01", 0, "One text.", WITHOUT_WORD),
        Judged("bank", "bank.n.01", 1, "Another text.", KEPT),
        Judged("bank", "bank.n.02", 0, "", NO_SENTENCE),
        Judged("shore", "bank.n.01", 0, "A third.", KEPT),
    ]
    senses = write_senses(judged, tmp_path)
    assert (senses.asked, senses.with_text, senses.outcomes) == (3, 2, {KEPT: 2, WITHOUT_WORD: 1, NO_SENTENCE: 1})
    assert "2 of 3 senses have text (66.7%); 2 texts kept, dropped: 1 (the word does not occur)" in senses.describe()
    assert pq.read_table(tmp_path / "senses.parquet").to_pylist() == [
        {"word": "bank", "synset": "bank.n.01", "number": 0, "outcome": WITHOUT_WORD},
        {"word": "bank", "synset": "bank.n.01", "number": 1, "outcome": KEPT},
        {"word": "bank", "synset": "bank.n.02", "number": 0, "outcome": NO_SENTENCE},
        {"word": "shore", "synset": "bank.n.01", "number": 0, "outcome": KEPT},
    ]
    documents = list(documents_of(judged))
    assert [(document.name, document.text) for document in documents] == [
        ("bank (bank.n.01) #1", "Another text."),
        ("shore (bank.n.01) #0", "A third."),
    ]
