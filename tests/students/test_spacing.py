"""Tests the choice of layers against choices made by hand, and blocks found by trying all of them."""

import random
from types import SimpleNamespace

import pytest

from dskd.config import Config, StudentConfig
from dskd.errors import UserError
from dskd.students.cutting import recipe
from dskd.students.spacing import Importance, choose_layers


@pytest.mark.parametrize(
    ("layers", "train_layers", "kept"),
    [
        (5, 2, [0, 1, 2, 8, 9]),
        (5, 1, [0, 1, 2, 3, 9]),
        (5, 4, [0, 6, 7, 8, 9]),
        (5, (3, 4), [0, 1, 2, 8, 9]),
        (5, (0, 4), [0, 1, 2, 3, 9]),
        (5, (4, 0, 2, 3), [0, 1, 7, 8, 9]),
        (4, (1, 3), [0, 1, 2, 9]),
        # The last is not trained, or all are: the last two stay, and always a lowest one.
        (4, (1,), [0, 1, 8, 9]),
        (5, (0, 1, 2), [0, 1, 2, 8, 9]),
        (5, (2, 3), [0, 1, 2, 8, 9]),
        (5, 0, [0, 1, 2, 8, 9]),
        (5, "all", [0, 1, 2, 8, 9]),
        (5, 5, [0, 1, 2, 8, 9]),
        (5, (0, 1, 2, 3, 4), [0, 1, 2, 8, 9]),
        (2, "all", [0, 9]),
        (2, 2, [0, 9]),
        (1, "all", [0]),
        (1, 1, [0]),
        (1, 0, [0]),
        (10, 3, list(range(10))),
        (9, 3, [0, 1, 2, 3, 4, 5, 7, 8, 9]),
    ],
)
def test_ends_keeps_the_lowest_layers_and_as_many_of_the_last_as_are_trained(layers, train_layers, kept):
    assert StudentConfig().spacing == "ends"  # the default
    student = StudentConfig(layers=layers, train_layers=train_layers, train_lm_head=True)
    assert choose_layers(student, 10) == kept


@pytest.mark.parametrize("seed", range(20))
def test_importance_removes_the_block_that_turns_states_least(seed):
    """Against all choices of as many layers that leave one block out, and keep the last ones."""
    draw = random.Random(seed)
    count = draw.randint(3, 12)
    layers = draw.randint(1, count - 1)
    train_layers = draw.randint(0, layers)
    size = count - layers
    blocks = tuple(draw.random() for _ in range(layers + 1))
    student = StudentConfig(layers=layers, train_layers=train_layers, train_lm_head=True, spacing="importance")
    found = choose_layers(student, count, Importance(1, 1, (0.5,) * count, blocks))
    last = set(range(count - student.last_layers, count))
    tried = {}
    for start in range(count - size + 1):
        kept = [layer for layer in range(count) if not start <= layer < start + size]
        if last <= set(kept):
            tried[blocks[start]] = kept
    assert found == tried[min(tried)]
    assert len(found) == layers


def test_of_equal_blocks_the_lowest_is_removed():
    student = StudentConfig(layers=4, train_layers=1, spacing="importance")
    importance = Importance(1, 1, (0.1,) * 6, (0.3, 0.2, 0.2, 0.4, 0.0))
    assert choose_layers(student, 6, importance) == [0, 3, 4, 5]


@pytest.mark.parametrize(("layers", "message"), [(6, "keeps all of the teacher's 6"), (7, "has 6 layers, so the")])
def test_importance_needs_a_layer_to_remove(layers, message):
    with pytest.raises(UserError, match=message):
        choose_layers(StudentConfig(layers=layers, spacing="importance"), 6)


def test_recipes_have_the_keys_that_choose_the_layers_and_no_others():
    """Students that were cut before there were other ways stay up to date."""

    def settings(**student):
        config = Config(workdir="w", teacher={"path": "t"}, student=student)
        made = recipe(config, SimpleNamespace(digest="digest", tokenizer_digest="tokenizer"))
        return made.inputs, made.config

    assert settings(layers=4, spacing="first") == ({}, {"layers": 4, "spacing": "first"})
    assert settings(layers=4, spacing="first", train_layers=1) == settings(layers=4, spacing="first")
    assert settings(layers=4, spacing="even") == ({}, {"layers": 4, "spacing": "even"})
    # The default was `first` then, which means nothing next to a list.
    assert settings(layers=(0, 5)) == ({}, {"layers": [0, 5], "spacing": "first"})
    assert settings(layers=(0, 5), spacing="even") == settings(layers=(0, 5))
    assert settings(layers=4) == ({}, {"layers": 4, "spacing": "ends", "last_layers": 2})
    assert settings(layers=4, train_layers=(2, 3)) == settings(layers=4, train_layers="all") == settings(layers=4)
    assert settings(layers=4, train_layers=1) != settings(layers=4)
    assert settings(layers=4, train_layers=(0, 3)) == settings(layers=4, train_layers=1)
    assert settings(layers=4, train_layers=(1,)) == settings(layers=4)
