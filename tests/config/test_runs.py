"""Runs and seeds that a configuration describes, and the choice of one of them."""

import pytest
from config_files import MINIMAL, write_config

from dskd.config.reading import load_config
from dskd.errors import UserError


def test_seeds_make_a_run_of_each(tmp_path):
    path = write_config(
        tmp_path,
        {**MINIMAL, "run": "b", "seeds": [3, 5], "runs": {"a": {"loss": {"margin": 3.0}}, "b": {}}},
    )
    config = load_config(path)
    assert config.run_names == ("a-s3", "a-s5", "b-s3", "b-s5")
    assert (config.run, config.seed) == ("b-s3", 3)
    other = load_config(path, ["run=a-s5"])
    assert (other.run, other.seed, other.loss.margin) == ("a-s5", 5, 3.0)
    again = write_config(tmp_path, other.as_dict())
    assert load_config(again) == other  # a config that is written down and read is the same
    with pytest.raises(UserError, match="there is no run 'c' in this file; its runs: a-s3, a-s5, b-s3, b-s5"):
        load_config(path, ["run=c"])


def test_seeds_need_no_runs_and_may_be_overrides(tmp_path):
    path = write_config(tmp_path, {**MINIMAL, "run": "only"})
    assert load_config(path, ["seeds=[0, 1]"]).run_names == ("only-s0", "only-s1")
    chosen = load_config(path, ["seeds=[0, 1]", "run=only-s1"])
    assert (chosen.run, chosen.seed, chosen.run_names) == ("only-s1", 1, ("only-s0", "only-s1"))
    with pytest.raises(UserError, match=r"override 'seeds=\[0, x\]': seeds.1: expected a whole number, found \"x\""):
        load_config(path, ["seeds=[0, x]"])


def test_a_run_may_differ_only_in_what_comes_after_the_shards(tmp_path):
    path = write_config(
        tmp_path,
        {**MINIMAL, "run": "a", "runs": {"a": {"senses": {"k": 3}}, "b": {"loss": {"margn": 1}}}},
    )
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "runs.a.senses: runs may differ only in loss, train, seed" in str(error.value)


def test_a_mistake_in_a_run_that_is_not_chosen_is_reported(tmp_path):
    path = write_config(tmp_path, {**MINIMAL, "run": "a", "runs": {"a": {}, "b": {"loss": {"margn": 1}}}})
    with pytest.raises(UserError, match=r"runs.b.loss.margn"):
        load_config(path)


@pytest.mark.parametrize("name", ["../x", "teacher", "student", "a b"])
def test_bad_run_names_are_refused_even_if_the_run_is_not_chosen(tmp_path, name):
    path = write_config(tmp_path, {**MINIMAL, "run": "a", "runs": {"a": {}, name: {}}})
    with pytest.raises(UserError, match="runs"):
        load_config(path)


@pytest.mark.parametrize("name", ["1", "on", "null", "plain"])
def test_run_names_that_yaml_reads_as_other_types_can_be_chosen(tmp_path, name):
    from dskd.pipeline import run_override

    path = write_config(tmp_path, {**MINIMAL, "run": name, "runs": {name: {}}})
    assert load_config(path, [run_override(name)]).run == name


@pytest.mark.parametrize(
    ("runs", "run"), [(["b", "a"], "b"), (["b", "dskd"], "dskd"), ([], "dskd")], ids=["others", "one", "none"]
)
def test_without_a_choice_the_run_is_dskd_or_the_first_of_the_file(tmp_path, runs, run):
    path = write_config(
        tmp_path,
        f"workdir: w\nteacher: {{path: a/b}}\nruns: {{{', '.join(f'{name}: {{}}' for name in runs)}}}",
    )
    assert load_config(path).run == run
    assert load_config(path, ["seeds=[4, 5]"]).run == f"{run}-s4"
    assert load_config(path, ["seeds=[4, 5]"]).run_names == tuple(f"{r}-s{s}" for r in runs or [run] for s in (4, 5))


def test_a_run_that_does_not_exist_is_refused(tmp_path):
    path = write_config(tmp_path, {**MINIMAL, "run": "a", "runs": {"a": {}, "b": {}}})
    with pytest.raises(UserError, match="there is no run 'c' in this file; its runs: a, b"):
        load_config(path, ["run=c"])
    with pytest.raises(UserError, match="1 problem in the configuration"):
        load_config(path, ["run=a/b"])


def test_a_seed_that_contradicts_seeds_is_refused(tmp_path):
    path = write_config(tmp_path, {**MINIMAL, "seeds": [3, 5], "runs": {"a": {}, "b": {"seed": 9}}})
    with pytest.raises(UserError, match=r"config\.yaml:\d+: runs\.b\.seed: `seeds` gives each run seeds of its own"):
        load_config(path)
    with pytest.raises(UserError, match=r"config\.yaml:\d+: seed: `seeds` gives each run seeds of its own"):
        load_config(write_config(tmp_path, {**MINIMAL, "seed": 1, "seeds": [3, 5]}))
    assert load_config(write_config(tmp_path, {**MINIMAL, "seed": 1}), ["seeds=[3, 5]"]).seed == 3
    path = write_config(tmp_path, {**MINIMAL, "seeds": [3, 5]})
    with pytest.raises(UserError, match=r"override 'seed=4': seed: the runs of `seeds` would all have this seed"):
        load_config(path, ["seed=4"])


@pytest.mark.parametrize(
    ("runs", "seeds", "message"),
    [
        ({"r" * 300: {}}, [], "at most 128 characters, .* this one has 300"),
        ({"r" * 127: {}}, [0], "at most 128 characters, .* this one has 130"),
        ({"KD": {}, "kd": {}}, [], "'KD' and 'kd' differ in capitals only"),
        ({"..": {}}, [], "runs"),
        ({"a/b": {}}, [], "runs"),
    ],
)
def test_run_names_that_cannot_name_a_folder_are_refused(tmp_path, runs, seeds, message):
    path = write_config(tmp_path, {**MINIMAL, "runs": runs, "seeds": seeds})
    with pytest.raises(UserError, match=message):
        load_config(path)
    if seeds or len(runs) > 1:
        return
    with pytest.raises(UserError):
        load_config(write_config(tmp_path, {**MINIMAL, "run": next(iter(runs))}))


def test_a_mistake_in_seeds_is_reported_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path, {**MINIMAL, "seeds": [True]}))
    assert str(error.value).count("\n") == 1
    assert "seeds.0: expected a whole number, found true" in str(error.value)
