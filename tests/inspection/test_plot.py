"""Pictures of senses: what they show, the projection to two dimensions, and the places of their labels."""

import numpy as np
import pytest
import torch
from small_dictionaries import make_dictionary

from dskd.errors import UserError
from dskd.inspection.artifacts import Teacher
from dskd.inspection.drawing import draw_picture
from dskd.inspection.labels import place_labels
from dskd.inspection.plot import choose_entries, compose_picture, project, tokens_of_words


def test_the_neighbours_with_most_states_are_drawn_tokens_before_spans_and_each_once(tmp_path, tokenizer, ids):
    pairs = ["big|large|synonym", "big|very large|synonym", "big|huge|synonym", "big|size|synonym", "big|small|antonym"]
    pairs += ["large|huge|synonym"]
    big, large, huge, size, span = ids["big"], ids["large"], ids["huge"], ids["size"], len(tokenizer)
    dictionary, _ = make_dictionary(
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
    dictionary, _ = make_dictionary(
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
