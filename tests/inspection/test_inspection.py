"""The results of the inspections, on dictionaries and tokenizers made by hand."""

import numpy as np
import pytest
import torch
from small_dictionaries import WORDS, all_vectors, make_dictionary

from dskd.inspection.artifacts import Teacher
from dskd.inspection.examples import choose_words, sense_difference
from dskd.inspection.histogram import histogram, histogram_text, log2_histogram
from dskd.inspection.lexicon import compute_coverage
from dskd.inspection.neighbours import nearest_entries
from dskd.inspection.tokens import entry_texts, readable, token_texts, whole_words
from dskd.inspection.word import near_spellings

# Rows are numbered by token: one of big, two of huge, five of very, two of tiny. huge's senses are farther apart.
PLACES = [[0.0], [0.0], [4.0], *[[9.0]] * 5, [0.0], [1.0]]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([9, 6, 2, *[9] * 5, 50, 50], ["huge", "tiny", "big"]),  # tiny has more states
        ([9, 5, 2, *[9] * 5, 50, 50], ["tiny", "big", "huge"]),  # so few states tell little about two senses
        ([3, 5, 2, *[9] * 5, 1, 1], ["huge", "tiny", "big"]),  # none has enough: by their senses, then states
        ([9, 6, 2, *[9] * 5, 0, 0], ["huge", "big"]),
    ],
)
def test_words_are_shown_that_have_relations_of_both_kinds_and_senses_that_differ_much(
    tmp_path, tokenizer, ids, counts, expected
):
    pairs = [
        f"{one}|{two}|{relation}"
        for one, two, relation in (
            ("big", "large", "synonym"),
            ("big", "small", "antonym"),
            ("tiny", "small", "synonym"),
            ("tiny", "large", "antonym"),
            ("huge", "large", "synonym"),
            ("huge", "small", "antonym"),
            ("very", "size", "synonym"),
        )
    ]
    sizes = {ids["big"]: 1, ids["huge"]: 2, ids["tiny"]: 2 if counts[-1] else 0, ids["very"]: 5}
    rows = sum(sizes.values())
    vectors = torch.tensor(PLACES[:rows]).expand(rows, 6) * (torch.arange(6) == 0)
    dictionary, _ = make_dictionary(tmp_path, tokenizer, pairs, sizes, vectors, counts[:rows])
    teacher = Teacher(None, tokenizer, len(tokenizer))
    assert dictionary.entries.neighbours("antonym").of(ids["small"])  # which has no senses, like large
    assert choose_words(dictionary, teacher, 9) == expected
    assert choose_words(dictionary, teacher, 1) == expected[:1]


def test_the_difference_of_senses_by_hand(tmp_path, tokenizer, ids):
    """With shares of 3/4 and 1/4 and a distance of 4 in one of 6 dimensions, the variance is 3; and a word of one sense
    has none.
    """
    vectors = torch.tensor([[1.0] * 6, [0.0] * 6, [4.0] + [0.0] * 5])
    sizes = {ids["big"]: 1, ids["huge"]: 2}
    dictionary, _ = make_dictionary(tmp_path, tokenizer, ["big|huge|synonym"], sizes, vectors, [5, 3, 1])
    in_use = 0.75**-0.75 * 0.25**-0.25  # of two senses
    assert sense_difference(dictionary, ids["huge"]) == pytest.approx(3 / 6 * in_use)
    assert sense_difference(dictionary, ids["big"]) == 0


@pytest.mark.parametrize("chunk_elements", [6, 18, 16_000_000])
def test_nearest_entries_are_those_of_a_brute_force_search(tmp_path, tokenizer, chunk_elements):
    sizes = {token: 1 + token % 3 for token in range(len(tokenizer))}
    dictionary, _ = make_dictionary(tmp_path, tokenizer, ["big|large|synonym"], sizes)
    vectors = all_vectors(dictionary).double().numpy()
    rows = dictionary.rows_of(5)
    found = nearest_entries(dictionary, rows, 4, without=5, chunk_elements=chunk_elements)
    assert len(found) == 3
    for row, neighbours in zip(rows, found, strict=True):
        distances = {}
        for entry in range(len(tokenizer)):
            others = dictionary.rows_of(entry)
            distances[entry] = min(float(np.linalg.norm(vectors[row] - vectors[other])) for other in others)
        expected = sorted((d, entry) for entry, d in distances.items() if entry != 5)[:4]
        assert [n.entry for n in neighbours] == [entry for _, entry in expected]
        np.testing.assert_allclose([n.distance for n in neighbours], [d for d, _ in expected], rtol=1e-5)


def test_equally_near_entries_are_in_order_and_entries_without_senses_are_absent(tmp_path, tokenizer):
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [300.0, 0.0]])
    dictionary, _ = make_dictionary(tmp_path, tokenizer, ["big|large|synonym"], {2: 1, 4: 1, 7: 1, 9: 1}, vectors)
    ((first, second, third),) = nearest_entries(dictionary, range(1), 8, without=2)
    assert [(n.entry, n.distance) for n in (first, second, third)] == [(4, 5.0), (7, 5.0), (9, 300.0)]


def test_tokens_are_shown_as_they_read_after_a_word():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Like sentencepiece: it adds a space before a text, and decoding removes it.
    tokens = ["<unk>", "▁", "▁the", "▁big", "ger", "▁of", *"thebigrof"]
    pieces = {token: -1.0 - i for i, token in enumerate(dict.fromkeys(tokens))}
    inner = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    vocabulary = tokenizer.get_vocab()
    big, ger = vocabulary["▁big"], vocabulary["ger"]
    assert token_texts(tokenizer, [[big], [ger], [big, ger]]) == [" big", "ger", " bigger"]
    assert whole_words(tokenizer, len(tokenizer)) == {big: "big", vocabulary["▁the"]: "the"}


def test_texts_for_a_list():
    assert [readable(text) for text in (" big", "ger", " very large", "\nthe", "(", " ")] == [
        "big",
        "…ger",
        "very large",
        "…\\nthe",
        "'('",
        "' '",
    ]


def test_entries_are_found_by_their_tokens_and_read_as_words(dictionary, tokenizer, ids):
    span = len(tokenizer)
    assert dictionary.entries.find([ids["very"], ids["large"]]) == span
    assert dictionary.entries.find([ids["large"], ids["very"]]) is None
    assert dictionary.entries.find([ids["big"]]) == ids["big"]
    assert dictionary.entries.find([]) is None
    assert dictionary.entries.find([1, 2, 3, 4]) is None
    assert entry_texts(dictionary.entries, [span, ids["big"]], tokenizer) == ["very large", "big"]


def test_near_spellings_ignore_case():
    words = ["Paris", "happy", "harpy", "parish", "unhappiness"]
    assert sorted(near_spellings("hapy", words)) == ["happy", "harpy"]
    assert near_spellings("paris", words)[0] == "Paris"
    assert near_spellings("zzzzz", words) == ()


def test_coverage_of_a_hand_made_lexicon(tmp_path, tokenizer, ids):
    # "of" is too short for a head, "x2y" a head that is not a word of letters.
    pairs = ["big|large|synonym", "big|small|antonym", "x2y|of|synonym", "big|of the very big size|synonym"]
    sizes = {ids["big"]: 1, ids["large"]: 1}
    dictionary, facts = make_dictionary(tmp_path, tokenizer, pairs, sizes)
    words = whole_words(tokenizer, len(tokenizer))
    assert sorted(words.values()) == ["big", "huge", "large", "size", "small", "the", "tiny", "very"]
    coverage = compute_coverage(words, dictionary.entries, facts, pairs=8 + 3, with_senses=False)
    assert coverage.heads == {"synonym": 2, "antonym": 2, "either": 3}
    assert coverage.other_heads == 1
    assert coverage.usable == {"synonym": 3, "antonym": 2}
    assert coverage.unusable == {
        "head is not one token": 1,
        "head is shorter than three letters": 1,
        "neighbour is longer than three tokens": 1,
        "the same pair to the tokenizer, or from another source": 3,
    }


def test_histograms_of_hand_made_counts():
    values = torch.tensor([0, 0, 1, 2, 3, 4, 7, 8, 1024])
    assert log2_histogram(values)[:5] == [("0", 2), ("1", 1), ("2-3", 2), ("4-7", 2), ("8-15", 1)]
    assert log2_histogram(values)[-1] == ("1,024-2,047", 1)
    assert histogram(torch.tensor([3, 0, 3])) == [("0", 1), ("1", 0), ("2", 0), ("3", 2)]
    assert histogram(values) == log2_histogram(values)
    assert (
        histogram_text([("0", 1), ("1", 0), ("2-3", 1000)])
        == f"    0      1  █\n    1      0\n  2-3  1,000  {'█' * 40}"
    )


def test_states_and_senses_of_each_token(dictionary, ids):
    states, senses = dictionary.states_per_token, dictionary.senses_per_token
    assert {word: int(senses[ids[word]]) for word in WORDS if senses[ids[word]]} == {
        "big": 3,
        "large": 2,
        "small": 2,
        "the": 1,
    }
    assert int(states[ids["big"]]) == 1 + 2 + 3
    assert int(states[ids["large"]]) == 4 + 5
    assert int(states.sum()) == sum(range(1, 9))  # the two rows of the span belong to no token
