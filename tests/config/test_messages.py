"""The descriptions of a configuration's keys, and messages about mistakes in it."""

import re

import pytest
from config_files import MINIMAL, write_config
from repository import REPOSITORY

from dskd.config import Config
from dskd.config.messages import describe
from dskd.config.reading import load_config
from dskd.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss=3", "loss: expected keys, such as loss.ce_weight=1.0, found 3"),
        ("teacher=x", 'teacher: expected keys, such as teacher.path=VALUE, found "x"'),
        ("runs=[a]", "runs: expected the name of each run with the keys in which it differs, such as kd: {}"),
        ("lexicon.tsv=a.tsv", 'lexicon.tsv: expected a list, such as [a, b], found "a.tsv"'),
        ("student.layers=x", 'student.layers: expected a whole number, or a list, such as [a, b], found "x"'),
        (
            "student.train_layers=[]",
            "student.train_layers: expected 'all', or a whole number, or a list with at least one entry, found []",
        ),
        ("corpus.tasks=[]", "corpus.tasks: expected a list with at least one entry, found []"),
        ("train.steps=1.5", "train.steps: expected a whole number, found 1.5"),
        ("loss.margin=x", 'loss.margin: expected a number, found "x"'),
        ("loss.margin=-1", "loss.margin: expected a number greater than or equal to 0, found -1"),
        ("tracking.enabled=1", "tracking.enabled: expected true or false, found 1"),
        ("tracking.experiment=7", "tracking.experiment: expected text, found 7; put it in quotes"),
        ("tracking.experiment=[7]", "tracking.experiment: expected text, found [7]\n"),
        ("teacher.mode=whole", "teacher.mode: expected 'auto', 'resident', 'zero3' or 'cached', found \"whole\""),
    ],
)
def test_messages_say_in_plain_words_what_a_value_must_be(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path, MINIMAL), [override])
    assert f": {message}" in f"{error.value}\n"


def test_the_documented_keys_are_those_that_dskd_config_prints():
    text = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"```text\n(.*)```\n", text, flags=re.DOTALL)
    assert printed == f"{describe()}\n", "docs/config.md is not up to date: `make docs` renews it"


def test_every_key_is_described():
    text = describe()
    assert "its own (O_i), those of its synonyms" in text  # the whole text of a section
    for section, field in Config.model_fields.items():
        assert section in text
        annotation = field.annotation
        if hasattr(annotation, "model_fields"):
            for key, inner in annotation.model_fields.items():
                assert f"{section}.{key}" in text
                assert inner.description or hasattr(inner.annotation, "model_fields") or key == "train_from_scratch"


def test_a_refused_run_name_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"'a b' cannot name a run: expected letters, digits, .* first"):
        load_config(write_config(tmp_path, {**MINIMAL, "run": "a b"}))


def test_a_removed_key_is_refused_with_the_reason(tmp_path):
    path = write_config(tmp_path, {**MINIMAL, "annotation": {"own_among_antonyms": False}})
    with pytest.raises(
        UserError, match=r"config\.yaml:\d+: annotation\.own_among_antonyms: this key was removed: .* delete"
    ):
        load_config(path)
