"""YAML of configurations: what is refused, numbers, and merged mappings."""

import pytest
from config_files import MINIMAL, write_config

from dskd.config.reading import load_config
from dskd.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "this is not YAML"),
        ("? [a, b]\n: 3\n", "this is not YAML|line 1: the key of this line has to be text, but is a list"),
        ("workdir: w\nruns:\n  1: {}\n", "line 3: the key 1 has to be text, but is a number; put it in quotes"),
        ("workdir: w\n2024-02-03: 1\n", "line 2: the key 2024-02-03 has to be text, but is a date"),
        ("workdir: 2024-02-30\n", "line 1: '2024-02-30' cannot be read as timestamp .*day is out of range"),
        ("a: 1\nseed: !!int abc\n", "line 2: 'abc' cannot be read as int"),
        ("seed: !!bool maybe\n", "line 1: 'maybe' cannot be read as bool"),
        ("seed: " + "9" * 5000, "line 1: '9999.*cannot be read as int .*limit"),
        ("seed: 0x" + "f" * 5000, "line 1: '0xfff.*cannot be read as int .*limit"),
        ("a: " + "[" * 3000, "this is not YAML"),
        ("- a\n- b\n", "expected sections"),
        ("workdir: w\nworkdir: v\n", "line 2: 'workdir' is given twice"),
        ("", "expected sections"),
    ],
)
def test_files_that_are_not_configurations_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write_config(tmp_path, text))


def test_scientific_notation_needs_no_dot(tmp_path):
    assert load_config(write_config(tmp_path, "workdir: w\nteacher: {path: a/b}\ntrain: {learning_rate: 5e-5}\n"))
    assert load_config(write_config(tmp_path, MINIMAL), ["train.learning_rate=2e-5"]).train.learning_rate == 2e-5


def test_merged_keys_are_read_and_may_be_overridden(tmp_path):
    path = write_config(
        tmp_path,
        """
x-common: &common {margin: 2.0, kd_weight: 3.0}
workdir: w
teacher: {path: a/b}
loss: &base
  <<: *common
  kd_weight: 4.0
runs:
  one: {loss: {<<: *base, margin: 5.0}}
  two:
    loss:
      <<: [{margin: 6.0}, *base]
""",
    )
    config = load_config(path)
    assert (config.loss.margin, config.loss.kd_weight) == (5.0, 4.0)
    two = load_config(path, ["run=two"])
    assert (two.loss.margin, two.loss.kd_weight) == (6.0, 4.0)  # of a list, the first mapping that has the key counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x-a: &a {k: 3}\nsenses:\n  <<: *a\n  k: 4\n  k: 5\n", r"line 7: 'k' is given twice \(first on line 6\)"),
        ("x-a: &a {k: 3, k: 4}\nsenses: {<<: *a}\n", r"line 3: 'k' is given twice"),
        ("x-a: &a {k: 3}\nsenses:\n  <<: *a\n  <<: *a\n", r"line 6: '<<' is given twice .* merge a list"),
        ("x-a: &a {kk: 3}\nsenses:\n  <<: *a\n", r"config\.yaml:3: senses\.kk: unknown key; did you mean senses\.k\?"),
        ("senses: {<<: 3}\n", r"line 3: << takes \*NAME of a mapping"),
        ("senses: &a {k: *a}\n", r"line 3: this contains itself|unconstructable recursive"),
        ("y-a: 3\n", r"config\.yaml:3: y-a: unknown key"),
    ],
)
def test_mistakes_in_merged_keys_are_reported_with_their_lines(tmp_path, text, message):
    path = write_config(tmp_path, f"workdir: w\nteacher: {{path: a/b}}\n{text}")
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(("text", "message"), [("# later\n", "but the file is empty"), ("- a\n", "found a list")])
def test_a_file_without_sections_is_refused(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"expected sections like 'teacher:' and 'train:', {message}"):
        load_config(path)
    with pytest.raises(UserError, match="this is a folder; name a file in it"):
        load_config(tmp_path)
