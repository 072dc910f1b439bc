"""The results of the inspections, on dictionaries, shards and tokenizers made by hand."""

import numpy as np
import pytest
import torch
from small_dictionaries import all_vectors, save_dictionary
from tiny_models import word_tokenizer

from dskd.artifacts.hashing import hash_files
from dskd.artifacts.mds import INDEX, read_samples
from dskd.errors import UserError
from dskd.inspection.artifacts import Teacher
from dskd.inspection.contexts import find_contexts, render_context
from dskd.inspection.drawing import draw_picture
from dskd.inspection.examples import choose_words, sense_difference
from dskd.inspection.histogram import histogram, histogram_text, log2_histogram
from dskd.inspection.labels import place_labels
from dskd.inspection.lexicon import compute_coverage
from dskd.inspection.neighbours import nearest_entries
from dskd.inspection.plot import choose_entries, compose_picture, project, tokens_of_words
from dskd.inspection.tokens import entry_texts, readable, token_texts, whole_words
from dskd.inspection.word import near_spellings
from dskd.lexicon.relations import Pairs, Relation
from dskd.senses.dictionary import read_dictionary
from dskd.senses.entries import build_entries
from dskd.shards import COLUMNS, join_blocks
from dskd.shards.writing import write_block

WORDS = ["big", "large", "huge", "small", "of", "very", "the", "size", "x2y", "tiny"]
T = 8


def _dictionary(folder, tokenizer, pairs, sizes, vectors=None, counts=None):
    """A dictionary with the entries of the pairs, each with the number of rows that `sizes` gives."""
    relations = Pairs(Relation(*pair.split("|"), "test") for pair in pairs).resolved()
    entries, facts = build_entries(relations, tokenizer, len(tokenizer))
    sizes = torch.tensor([sizes.get(entry, 0) for entry in range(entries.num_entries)])
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    rows = int(offsets[-1])
    if vectors is None:
        vectors = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    counts = torch.arange(1, rows + 1) if counts is None else torch.tensor(counts)
    save_dictionary(folder / "senses.safetensors", vectors.bfloat16(), counts, offsets, entries)
    return read_dictionary(folder / "senses.safetensors"), facts


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture
def ids(tokenizer):
    return tokenizer.get_vocab()


@pytest.fixture
def dictionary(tmp_path, tokenizer, ids):
    """big has a large and a very large synonym, a huge one without senses, and a small antonym."""
    pairs = ["big|large|synonym", "big|very large|synonym", "big|huge|synonym", "big|small|antonym"]
    sizes = {ids["big"]: 3, ids["large"]: 2, ids["small"]: 2, ids["the"]: 1, len(tokenizer): 2}
    return _dictionary(tmp_path, tokenizer, pairs, sizes)[0]


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
    dictionary, _ = _dictionary(tmp_path, tokenizer, pairs, sizes, vectors, counts[:rows])
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
    dictionary, _ = _dictionary(tmp_path, tokenizer, ["big|huge|synonym"], sizes, vectors, [5, 3, 1])
    in_use = 0.75**-0.75 * 0.25**-0.25  # of two senses
    assert sense_difference(dictionary, ids["huge"]) == pytest.approx(3 / 6 * in_use)
    assert sense_difference(dictionary, ids["big"]) == 0


# ---------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("chunk_elements", [6, 18, 16_000_000])
def test_nearest_entries_are_those_of_a_brute_force_search(tmp_path, tokenizer, chunk_elements):
    sizes = {token: 1 + token % 3 for token in range(len(tokenizer))}
    dictionary, _ = _dictionary(tmp_path, tokenizer, ["big|large|synonym"], sizes)
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
    dictionary, _ = _dictionary(tmp_path, tokenizer, ["big|large|synonym"], {2: 1, 4: 1, 7: 1, 9: 1}, vectors)
    ((first, second, third),) = nearest_entries(dictionary, range(1), 8, without=2)
    assert [(n.entry, n.distance) for n in (first, second, third)] == [(4, 5.0), (7, 5.0), (9, 300.0)]


# ------------------------------------------------------------------------------------------------------------- tokens


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
    # "of" is too short for a head, "x2y" a head that is no word of letters.
    pairs = ["big|large|synonym", "big|small|antonym", "x2y|of|synonym", "big|of the very big size|synonym"]
    sizes = {ids["big"]: 1, ids["large"]: 1}
    dictionary, facts = _dictionary(tmp_path, tokenizer, pairs, sizes)
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


# --------------------------------------------------------------------------------------------------------- histograms


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


# ----------------------------------------------------------------------------------------------------------- contexts


def _sample(input_ids, sense_rows, synonym_rows=()):
    columns = {name: np.full((T, 2), -1, np.int32) for name in ("sense_ids", "synonym_ids", "antonym_ids")}
    for position, row in sense_rows.items():
        columns["sense_ids"][position, 0] = row
    for position, rank, row in synonym_rows:
        columns["synonym_ids"][position, rank] = row
    starts = np.eye(1, T, dtype=np.uint8)[0]
    return {
        "input_ids": np.array(input_ids, np.int32),
        "loss_mask": np.ones(T, np.uint8),
        "document_starts": starts,
        **columns,
    }


@pytest.fixture
def shards(tmp_path, ids):
    text = [[ids[word] for word in ["the", "big", "size", "of", "very", "big", "the", "small"]]] * 3
    samples = [
        _sample(text[0], {0: 4, 4: 5}, [(6, 1, 9)]),
        _sample(text[1], {0: 5, 4: 5}),
        _sample(text[2], {4: 4}),
    ]
    folder = tmp_path / "train"
    write_block(folder / "block-0", iter(samples[:2]))
    write_block(folder / "block-1", iter(samples[2:]))
    join_blocks(folder, [folder / "block-0", folder / "block-1"])
    return folder, samples


def test_shards_are_read_as_they_were_written_and_stay_as_they_are(shards):
    folder, samples = shards
    before = hash_files(folder)
    for read, written in zip(read_samples(folder / INDEX), samples, strict=True):
        for name in COLUMNS:
            assert np.array_equal(read[name], written[name])
    assert hash_files(folder) == before


def test_contexts_are_the_places_where_a_row_is_nearest(shards, tokenizer):
    folder, _ = shards
    contexts = find_contexts(folder, 3, range(4, 6), tokenizer, of_synonyms=False, per_row=2, scan=99)
    first, second = "the «big» size of very big the small", "the big size of very «big» the small"
    assert contexts == ({4: [first, second], 5: [second, first]}, 3)


def test_the_scan_stops_when_every_row_has_enough_places_or_at_its_limit(shards, tokenizer):
    folder, _ = shards
    places, samples_read = find_contexts(folder, 3, range(5, 6), tokenizer, of_synonyms=False, per_row=1, scan=99)
    assert (len(places[5]), samples_read) == (1, 1)
    places, samples_read = find_contexts(folder, 3, range(4, 5), tokenizer, of_synonyms=False, per_row=9, scan=2)
    assert (len(places[4]), samples_read) == (1, 2)


def test_a_span_is_shown_where_a_synonym_is_pulled_to_it(shards, tokenizer):
    places, _ = find_contexts(shards[0], 3, range(9, 10), tokenizer, of_synonyms=True, per_row=3, scan=99)
    assert places == {9: ["the big size of very big the «small»"]}


def test_a_context_is_a_window_that_ends_with_its_document(tokenizer, ids):
    words = ["size", "<end>", *["big"] * 3, "small", *["the"] * 3, "<end>", "size"]
    text = [ids[word] for word in words]
    assert render_context(tokenizer, text, 5) == "big big big «small» the the the"
    long = [ids["big"]] * 40 + [ids["small"]] + [ids["the"]] * 40
    assert render_context(tokenizer, long, 40) == f"… {'big ' * 16}«small»{' the' * 8} …"


def test_a_tampered_shard_is_named(shards):
    folder, _ = shards
    path = folder / "shard.00001.mds.zstd"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"shard\.00001\.mds\.zstd: the content is not what index\.json says"):
        list(read_samples(folder / INDEX))


def test_contexts_are_found_without_reading_stored_states(shards, tmp_path, tokenizer):
    """At the shape of a real model, states are over 99 % of a shard."""
    folder, samples = shards
    with_states = [{**sample, "trunk_states": np.full((8, 500), 1.0, np.float32)} for sample in samples]
    stored = tmp_path / "stored"
    write_block(stored, with_states, {**COLUMNS, "trunk_states": "ndarray:float32"}, compression=None)
    path = stored / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-9] + b"\1" * 9)  # inside of the states
    with pytest.raises(UserError, match="the content is not what"):
        list(read_samples(stored / INDEX))
    (read, *_) = read_samples(stored / INDEX, columns=("input_ids", "sense_ids"))
    assert set(read) == {"input_ids", "sense_ids"}
    assert np.array_equal(read["sense_ids"], samples[0]["sense_ids"])
    for of_synonyms, rows in ((False, range(4, 6)), (True, range(9, 10))):
        found, expected = (
            find_contexts(place, 3, rows, tokenizer, of_synonyms=of_synonyms, per_row=2, scan=99)
            for place in (stored, folder)
        )
        assert found == expected


# ----------------------------------------------------------------------------------------------------------- pictures


def test_the_neighbours_with_most_states_are_drawn_tokens_before_spans_and_each_once(tmp_path, tokenizer, ids):
    pairs = ["big|large|synonym", "big|very large|synonym", "big|huge|synonym", "big|size|synonym", "big|small|antonym"]
    pairs += ["large|huge|synonym"]
    big, large, huge, size, span = ids["big"], ids["large"], ids["huge"], ids["size"], len(tokenizer)
    dictionary, _ = _dictionary(
        tmp_path, tokenizer, pairs, {big: 1, large: 1, huge: 1, size: 1, span: 1}, counts=[5, 1, 2, 9, 90]
    )
    assert choose_entries(dictionary, [big], 3) == [
        (big, 0, "word"),
        (size, 0, "synonym"),
        (huge, 0, "synonym"),
        (large, 0, "synonym"),
    ]
    assert choose_entries(dictionary, [big], 99)[-1] == (span, 0, "synonym")
    # A word of the picture is not drawn as a neighbour too, and huge is already drawn as a neighbour of big.
    assert choose_entries(dictionary, [big, large], 2) == [
        (big, 0, "word"),
        (large, 1, "word"),
        (size, 0, "synonym"),
        (huge, 0, "synonym"),
    ]


def test_pca_is_that_of_a_singular_value_decomposition():
    vectors = np.random.default_rng(0).normal(size=(12, 5)) * [5, 3, 1, 1, 1]
    points, how = project(vectors, "pca", 0)
    centred = vectors - vectors.mean(0)
    _, values, axes = np.linalg.svd(centred)
    np.testing.assert_allclose(np.abs(points), np.abs(centred @ axes[:2].T), atol=1e-8)
    shares = 100 * values**2 / (values**2).sum()
    assert how == f"PCA, {shares[0]:.0f} % + {shares[1]:.0f} % of the variance"


@pytest.mark.parametrize("size", [3, 40])
def test_tsne_takes_few_points_and_gives_the_same_for_a_seed(size):
    vectors = np.random.default_rng(0).normal(size=(size, 5)).astype(np.float32)
    points, how = project(vectors, "tsne", 2**40 + 1)
    assert points.shape == (size, 2)
    assert np.isfinite(points).all()
    assert np.array_equal(points, project(vectors, "tsne", 2**40 + 1)[0])
    assert how == f"t-SNE, perplexity {(size - 1) / 3:.3g}"


def test_every_word_that_cannot_be_drawn_is_named(dictionary, tokenizer):
    teacher = Teacher(None, tokenizer, len(tokenizer))
    with pytest.raises(UserError) as error:
        tokens_of_words(dictionary, teacher, ["big", "very large", "tiny"])
    assert "2 of 3 words cannot be drawn" in str(error.value)
    assert "very large: the tokenizer makes 2 tokens of it (very | large)" in str(error.value)
    assert "tiny: it has no senses" in str(error.value)


def test_too_few_senses_for_a_picture_are_refused(tmp_path, tokenizer, ids):
    teacher = Teacher(None, tokenizer, len(tokenizer))
    dictionary, _ = _dictionary(
        tmp_path, tokenizer, ["big|large|synonym"], {ids["big"]: 3}, torch.ones(3, 6) * torch.tensor([[1.0], [2], [2]])
    )
    with pytest.raises(UserError, match="there are 2 different senses to draw, and a picture needs 3"):
        compose_picture(dictionary, teacher, ["big"], method="pca", neighbours=5, seed=0)


def test_a_picture_holds_words_and_neighbours_and_is_the_only_file_written(dictionary, tokenizer, tmp_path):
    import matplotlib.image

    teacher = Teacher(None, tokenizer, len(tokenizer))
    picture = compose_picture(dictionary, teacher, ["big", "the", "big"], method="pca", neighbours=5, seed=0)
    assert picture.words == ("big", "the")
    assert [(e.text, e.of_word, e.kind, e.points.stop - e.points.start) for e in picture.entries] == [
        ("big", 0, "word", 3),
        ("the", 1, "word", 1),
        ("large", 0, "synonym", 2),
        ("very large", 0, "synonym", 2),
        ("small", 0, "antonym", 2),
    ]
    assert len(picture.points) == len(picture.counts) == 10
    assert picture.title.startswith("Senses of big and the: PCA, ")
    path = tmp_path / "pictures" / "senses.png"
    assert draw_picture(picture, path) == 0
    assert [file.name for file in path.parent.iterdir()] == ["senses.png"]
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 500
    assert image.std() > 0.01  # it is not blank


def test_labels_neither_overlap_nor_leave_the_picture():
    random = np.random.default_rng(0)
    anchors = random.uniform(300, 500, size=(40, 2))
    sizes = np.stack([random.uniform(20, 80, 40), np.full(40, 12.0)], axis=1)
    radii = np.full(40, 5.0)
    centres = place_labels(anchors, radii, sizes, anchors, radii, (200, 200, 600, 600))
    boxes = [(*(c - s / 2), *(c + s / 2)) for c, s in zip(centres, sizes, strict=True) if c is not None]
    assert len(boxes) > 30
    for number, (left, bottom, right, top) in enumerate(boxes):
        assert (left, bottom) >= (200, 200)
        assert right <= 600 and top <= 600
        for other in boxes[:number]:
            assert right <= other[0] or other[2] <= left or top <= other[1] or other[3] <= bottom


def test_a_label_without_room_is_omitted_and_others_are_next_to_their_points():
    anchors, sizes = np.array([[50.0, 50.0], [50.0, 50.0]]), np.array([[40.0, 10.0], [400.0, 10.0]])
    first, second = place_labels(anchors, np.full(2, 4.0), sizes, anchors[:1], np.full(1, 4.0), (0, 0, 200, 100))
    assert second is None
    assert first == (50 + 4 + 3 + 20, 50)
