import re

import pytest
import yaml
from conftest import REPOSITORY

from dskd.config import Config
from dskd.config.messages import describe
from dskd.config.reading import differences, load_config
from dskd.errors import UserError

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
MINIMAL = {"workdir": "w", "teacher": {"path": "a/b"}}


def _write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return path


def _keys(data, prefix=()):
    for key, value in data.items():
        yield (*prefix, key)
        if isinstance(value, dict) and prefix != ("runs",):
            yield from _keys(value, (*prefix, key))


def _renamed(data, path):
    """A copy with one key misspelt."""
    head, *rest = path
    return {
        (f"{key}x" if key == head and not rest else key): (_renamed(value, rest) if key == head and rest else value)
        for key, value in data.items()
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_with_each_of_its_runs(path):
    for run in load_config(path).run_names:
        assert load_config(path, [f"run={run}"]).run == run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_typo_in_a_shipped_config_fails_and_is_named(path, tmp_path):
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = [key for key in _keys(data) if not (key[0] == "runs" and len(key) == 2)]
    assert len(keys) > 20
    for key in keys:
        with pytest.raises(UserError) as error:
            load_config(_write(tmp_path, _renamed(data, key)))
        assert f"{key[-1]}x" in str(error.value), key


def test_all_problems_are_reported_at_once_with_their_lines(tmp_path):
    path = _write(
        tmp_path,
        "workdir: w\n"
        "teacher:\n  path: a/b\n  offlaod: cpu\n"
        "train:\n  learning_rate: -1\n  steps: many\n"
        "loss: {margin: 1e-1, sens_weight: 2}\n",
    )
    with pytest.raises(UserError) as error:
        load_config(path, ["train.epochs=0", "nonsense", "senses.k=true"])
    message = str(error.value)
    assert "7 problems in the configuration" in message
    for part in (
        f"{path}:4: teacher.offlaod: unknown key; did you mean teacher.offload?",
        f"{path}:6: train.learning_rate:",
        f"{path}:7: train.steps:",
        f"{path}:8: loss.sens_weight: unknown key; did you mean loss.sense_weight?",
        "override 'train.epochs=0'",
        "'nonsense': an override is section.key=value",
        "override 'senses.k=true'",
    ):
        assert part in message


def test_seeds_make_a_run_of_each(tmp_path):
    path = _write(tmp_path, {**MINIMAL, "run": "b", "seeds": [3, 5], "runs": {"a": {"loss": {"margin": 3.0}}, "b": {}}})
    config = load_config(path)
    assert config.run_names == ("a-s3", "a-s5", "b-s3", "b-s5")
    assert (config.run, config.seed) == ("b-s3", 3)
    other = load_config(path, ["run=a-s5"])
    assert (other.run, other.seed, other.loss.margin) == ("a-s5", 5, 3.0)
    again = _write(tmp_path, other.as_dict())
    assert load_config(again) == other  # a config that is written down and read is the same
    with pytest.raises(UserError, match="'c' is none of the runs of this file: a-s3, a-s5, b-s3, b-s5"):
        load_config(path, ["run=c"])


def test_seeds_need_no_runs_and_may_stand_on_the_command_line(tmp_path):
    path = _write(tmp_path, {**MINIMAL, "run": "only"})
    assert load_config(path, ["seeds=[0, 1]"]).run_names == ("only-s0", "only-s1")
    chosen = load_config(path, ["seeds=[0, 1]", "run=only-s1"])
    assert (chosen.run, chosen.seed, chosen.run_names) == ("only-s1", 1, ("only-s0", "only-s1"))
    with pytest.raises(UserError, match=r"override 'seeds=\[0, x\]': seeds.1: expected a whole number, found \"x\""):
        load_config(path, ["seeds=[0, x]"])


def test_overrides_win_over_runs_and_runs_over_the_file(tmp_path):
    path = _write(
        tmp_path,
        {**MINIMAL, "loss": {"margin": 2.0, "kd_weight": 0.1}, "run": "a", "runs": {"a": {"loss": {"margin": 3.0}}}},
    )
    config = load_config(path, ["loss.kd_weight=0.5"])
    assert (config.loss.margin, config.loss.kd_weight) == (3.0, 0.5)
    assert load_config(path, ["loss.margin=4"]).loss.margin == 4.0


def test_a_run_may_differ_only_in_what_comes_after_the_shards(tmp_path):
    path = _write(tmp_path, {**MINIMAL, "run": "a", "runs": {"a": {"senses": {"k": 3}}, "b": {"loss": {"margn": 1}}}})
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "runs.a.senses: a run may differ in loss, train, seed" in str(error.value)


def test_a_mistake_in_a_run_that_is_not_chosen_is_found(tmp_path):
    path = _write(tmp_path, {**MINIMAL, "run": "a", "runs": {"a": {}, "b": {"loss": {"margn": 1}}}})
    with pytest.raises(UserError, match=r"runs.b.loss.margn"):
        load_config(path)


@pytest.mark.parametrize("name", ["../x", "teacher", "student", "a b"])
def test_names_that_no_run_may_have_are_refused_before_it_is_chosen(tmp_path, name):
    path = _write(tmp_path, {**MINIMAL, "run": "a", "runs": {"a": {}, name: {}}})
    with pytest.raises(UserError, match="runs"):
        load_config(path)


@pytest.mark.parametrize("name", ["1", "on", "null", "plain"])
def test_names_that_yaml_reads_otherwise_can_be_chosen(tmp_path, name):
    from dskd.pipeline import run_override

    path = _write(tmp_path, {**MINIMAL, "run": name, "runs": {name: {}}})
    assert load_config(path, [run_override(name)]).run == name


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=.inf",
        "student.layers=[]",
        "student.layers=0",
        "student.train_layers=-1",
        "student.layers=[3, 1, 1]",
        "student.train_layers=17",
        "student.train_layers=[16]",
        "seeds=[0, 1, 0]",
        "loss.temperature=.nan",
    ],
)
def test_values_that_cannot_be_meant_are_refused(tmp_path, override):
    with pytest.raises(UserError, match="1 problem"):
        load_config(_write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize(
    ("corpus", "messages"),
    [
        (
            {"train": ["a.txt"], "dataset": "a/b", "validation_split": "test"},
            ["corpus.train needs source: files", "corpus.dataset and corpus.validation_split need source: huggingface"],
        ),
        (
            {"source": "huggingface", "validation": ["a.txt"]},
            ["source: huggingface needs corpus.dataset", "corpus.validation needs source: files"],
        ),
        (
            {"source": "files", "dataset_config": "x"},
            ["source: files needs corpus.train", "corpus.dataset_config needs source: huggingface"],
        ),
        ({"packing": "concat"}, ["'documents', 'stream' or 'none'"]),
    ],
)
def test_keys_of_another_source_of_text_are_all_named(tmp_path, corpus, messages):
    with pytest.raises(UserError) as error:
        load_config(_write(tmp_path, {**MINIMAL, "corpus": corpus}))
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("runs", "run"), [(["b", "a"], "b"), (["b", "dskd"], "dskd"), ([], "dskd")], ids=["others", "one", "none"]
)
def test_a_run_that_is_not_chosen_is_dskd_or_the_first_of_the_file(tmp_path, runs, run):
    path = _write(
        tmp_path, f"workdir: w\nteacher: {{path: a/b}}\nruns: {{{', '.join(f'{name}: {{}}' for name in runs)}}}"
    )
    assert load_config(path).run == run
    assert load_config(path, ["seeds=[4, 5]"]).run == f"{run}-s4"
    assert load_config(path, ["seeds=[4, 5]"]).run_names == tuple(f"{r}-s{s}" for r in runs or [run] for s in (4, 5))


def test_layers_are_compared_with_each_other(tmp_path):
    path = _write(tmp_path, {**MINIMAL, "student": {"layers": [5, 1, 5], "train_layers": [1, 2]}})
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "student: layers: expected different layers in ascending order, such as [1, 5], found [5, 1, 5]" in str(
        error.value
    )
    assert "train_layers: the student has layers 0 to 1, but not [2]" in str(error.value)
    assert load_config(path, ["student.layers=[1, 5, 7]"]).student.train_layers == (1, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss=3", "loss: expected keys, such as loss.ce_weight=1.0, found 3"),
        ("teacher=x", 'teacher: expected keys, such as teacher.path=VALUE, found "x"'),
        ("runs=[a]", "runs: expected keys, such as NAME: {}, found"),
        ("lexicon.tsv=a.tsv", 'lexicon.tsv: expected a list, such as [a, b], found "a.tsv"'),
        ("student.layers=x", 'student.layers: expected a whole number, or a list, such as [a, b], found "x"'),
        ("train.steps=1.5", "train.steps: expected a whole number, found 1.5"),
        ("loss.margin=x", 'loss.margin: expected a number, found "x"'),
        ("loss.margin=-1", "loss.margin: expected a number greater than or equal to 0, found -1"),
        ("tracking.enabled=1", "tracking.enabled: expected true or false, found 1"),
        ("tracking.experiment=7", "tracking.experiment: expected text, found 7; put it in quotes"),
        ("tracking.experiment=[7]", "tracking.experiment: expected text, found [7]\n"),
        ("teacher.mode=whole", "teacher.mode: expected 'resident', 'zero3' or 'cached', found \"whole\""),
    ],
)
def test_what_a_value_has_to_be_is_said_in_plain_words(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        load_config(_write(tmp_path, MINIMAL), [override])
    assert f": {message}" in f"{error.value}\n"


def test_the_documented_keys_are_those_that_the_command_prints():
    text = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"```text\n(.*)```\n", text, flags=re.DOTALL)
    assert printed == f"{describe()}\n", "docs/config.md is not up to date: `make docs` renews it"


def test_a_run_that_does_not_exist_is_refused(tmp_path):
    path = _write(tmp_path, {**MINIMAL, "run": "a", "runs": {"a": {}, "b": {}}})
    with pytest.raises(UserError, match="'c' is none of the runs of this file: a, b"):
        load_config(path, ["run=c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "this is not YAML"),
        ("? [a, b]\n: 3\n", "this is not YAML that a configuration can be|line 1: a key of a configuration is text"),
        ("workdir: w\nruns:\n  1: {}\n", "line 3: a key of a configuration is text, and YAML reads this one as int"),
        ("workdir: w\n2024-02-03: 1\n", "line 2: a key of a configuration is text, and YAML reads this one as date"),
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
def test_files_that_are_no_configs(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(_write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such config file"):
        load_config(tmp_path / "none.yaml")


def test_scientific_notation_needs_no_dot(tmp_path):
    assert load_config(_write(tmp_path, "workdir: w\nteacher: {path: a/b}\ntrain: {learning_rate: 5e-5}\n"))
    assert load_config(_write(tmp_path, MINIMAL), ["train.learning_rate=2e-5"]).train.learning_rate == 2e-5


def test_a_config_cannot_be_changed():
    config = Config(**MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_every_key_is_described():
    text = describe()
    assert "its own (O_i), those of its synonyms" in text  # a section is told of to the end
    for section, field in Config.model_fields.items():
        assert section in text
        annotation = field.annotation
        if hasattr(annotation, "model_fields"):
            for key, inner in annotation.model_fields.items():
                assert f"{section}.{key}" in text
                assert inner.description or hasattr(inner.annotation, "model_fields") or key == "train_from_scratch"


def test_differences_are_dotted():
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})) == [
        ("a.c", 2, 3),
        ("d", None, 4),
    ]


def test_sections_that_do_not_fit_together_are_all_named(tmp_path):
    path = _write(
        tmp_path,
        {
            **MINIMAL,
            "teacher": {"path": "a/b", "mode": "cached"},
            "loss": {"hidden_weight": 1.0, "sense_form": "distribution"},
            "student": {"shared_trunk": "on"},
            "annotation": {"continuation_tokens": 3},
        },
    )
    with pytest.raises(UserError) as error:
        load_config(path)
    for part in (
        "teacher.mode: cached needs annotation.teacher_top_n",
        "loss.hidden_weight needs the teacher's states",
        "loss.sense_form: distribution needs the teacher's states, which teacher.mode: cached has not",
        "student.shared_trunk: on needs a teacher in training",
        "annotation.continuation_tokens needs corpus.packing: none",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("loss", "messages"),
    [
        (
            {"sense_temperature": 0.2, "sense_candidates": ["own"]},
            [
                "loss.sense_temperature and loss.sense_candidates need sense_form: distribution, and it is distance",
                "leave them at their defaults",
            ],
        ),
        ({"sense_form": "distribution", "margin": 2.0}, ["loss.margin needs sense_form: distance, and it is distr"]),
        (
            {"sense_form": "distribution", "sense_candidates": ["own"], "sense_random_candidates": 9},
            ["loss.sense_random_candidates needs random in loss.sense_candidates"],
        ),
        (
            {"lexical_weight": 1.2, "ce_weight": 0.0, "kd_weight": 0.0},
            ["loss.lexical_weight is of CE and KL, whose weights are 0"],
        ),
        ({"sense_candidates": []}, ["loss.sense_candidates"]),
        ({"lexical_weight": 0.0}, ["loss.lexical_weight"]),
    ],
)
def test_keys_of_the_loss_that_would_do_nothing_are_refused(tmp_path, loss, messages):
    with pytest.raises(UserError) as error:
        load_config(_write(tmp_path, {**MINIMAL, "loss": loss}))
    for message in messages:
        assert message in str(error.value)


def test_a_run_can_have_another_form_of_the_sense_loss(tmp_path):
    forms = {"a": {}, "b": {"loss": {"sense_form": "distribution", "sense_candidates": ["own", "random"]}}}
    path = _write(tmp_path, {**MINIMAL, "loss": {"kd_weight": 0.0}, "run": "a", "runs": forms})
    assert not load_config(path).needs_teacher
    config = load_config(path, ["run=b"])
    assert config.loss.sense_candidates == ("own", "random")
    assert config.needs_teacher
    assert not load_config(path, ["run=b", "loss.sense_weight=0"]).needs_teacher


@pytest.mark.parametrize(
    ("teacher", "message"),
    [({"offload": "nvme"}, "offload: nvme needs nvme_path"), ({"nvme_path": "/x"}, "nvme_path needs offload: nvme")],
)
def test_an_offload_is_given_whole(tmp_path, teacher, message):
    with pytest.raises(UserError, match=message):
        load_config(_write(tmp_path, {**MINIMAL, "teacher": {"path": "a/b", **teacher}}))


def test_merged_keys_are_read_and_may_be_given_again(tmp_path):
    path = _write(
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
def test_mistakes_around_merged_keys_have_their_lines(tmp_path, text, message):
    path = _write(tmp_path, f"workdir: w\nteacher: {{path: a/b}}\n{text}")
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_a_seed_that_would_undo_seeds_is_refused(tmp_path):
    path = _write(tmp_path, {**MINIMAL, "seeds": [3, 5], "runs": {"a": {}, "b": {"seed": 9}}})
    with pytest.raises(UserError, match=r"config\.yaml:\d+: runs\.b\.seed: `seeds` trains this run"):
        load_config(path)
    with pytest.raises(UserError, match=r"config\.yaml:\d+: seed: `seeds` trains each run with each of its own"):
        load_config(_write(tmp_path, {**MINIMAL, "seed": 1, "seeds": [3, 5]}))
    assert load_config(_write(tmp_path, {**MINIMAL, "seed": 1}), ["seeds=[3, 5]"]).seed == 3
    path = _write(tmp_path, {**MINIMAL, "seeds": [3, 5]})
    with pytest.raises(UserError, match=r"override 'seed=4': seed: the runs of `seeds` would all have this seed"):
        load_config(path, ["seed=4"])


def test_variables_are_expanded_in_paths_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = _write(
        tmp_path,
        {
            "workdir": "$SCRATCH/x$$y",
            "teacher": {"path": "${SCRATCH}/teacher", "offload": "nvme", "nvme_path": "$SCRATCH"},
            "corpus": {"source": "files", "train": ["a.txt", "$SCRATCH/b"], "text_field": "$SCRATCH"},
            "tracking": {"experiment": "$SCRATCH"},
        },
    )
    config = load_config(path, ["tasks.piqa=$SCRATCH/piqa"])
    assert (config.workdir, config.teacher.path) == ("/scratch/me/x$y", "/scratch/me/teacher")
    assert (config.teacher.nvme_path, config.tasks.piqa) == ("/scratch/me", "/scratch/me/piqa")
    assert config.corpus.train == ("a.txt", "/scratch/me/b")
    assert (config.corpus.text_field, config.tracking.experiment) == ("$SCRATCH", "$SCRATCH")


def test_a_variable_that_is_not_set_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    path = _write(
        tmp_path, {**MINIMAL, "workdir": "$NO_SUCH/x", "corpus": {"source": "files", "train": ["${NO_SUCH}"]}}
    )
    with pytest.raises(UserError) as error:
        load_config(path, ["tracking.uri=http://me:$NO_SUCH@host"])
    for part in (
        "workdir: $NO_SUCH is not set in the environment",
        "corpus.train.0: $NO_SUCH is not set",
        "tracking.uri: $NO_SUCH is not expanded here",
    ):
        assert part in str(error.value)


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
def test_names_that_no_folder_can_have_are_refused(tmp_path, runs, seeds, message):
    path = _write(tmp_path, {**MINIMAL, "runs": runs, "seeds": seeds})
    with pytest.raises(UserError, match=message):
        load_config(path)
    if seeds or len(runs) > 1:
        return
    with pytest.raises(UserError):
        load_config(_write(tmp_path, {**MINIMAL, "run": next(iter(runs))}))


def test_a_mistake_in_seeds_is_reported_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_config(_write(tmp_path, {**MINIMAL, "seeds": [True]}))
    assert str(error.value).count("\n") == 1
    assert "seeds.0: expected a whole number, found true" in str(error.value)


def test_what_a_run_may_be_called_is_said_in_words(tmp_path):
    with pytest.raises(UserError, match=r"'a b' cannot name a run: expected letters, digits, .* first"):
        load_config(_write(tmp_path, {**MINIMAL, "run": "a b"}))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("${HOME:-/x}/y", r"has a \$\{ that is not \$\{NAME\}"),
        ("/x/${", r"has a \$\{ that is not \$\{NAME\}"),
        ("~no-such-user/x", "the home folder of a user that this machine does not know"),
        (f"/x/{'é' * 200}/y", "has 400 bytes, and a file's name has 255 at most"),
        ("/x" * 3000, "has 6,000 bytes, and a path has 4,095 at most"),
        ("/x/\0y", "cannot contain the character NUL"),
    ],
)
def test_paths_that_no_file_can_have_are_refused_by_their_keys(tmp_path, path, message):
    with pytest.raises(UserError, match=rf"config\.yaml:\d+: workdir: .*{message}"):
        load_config(_write(tmp_path, {"workdir": path, "teacher": {"path": "x"}}))
    with pytest.raises(UserError, match=rf"corpus\.train\.0: .*{message}"):
        load_config(_write(tmp_path, {**MINIMAL, "corpus": {"source": "files", "train": [path]}}))
    assert load_config(_write(tmp_path, {"workdir": "/x/$${y}", "teacher": {"path": "x"}})).workdir == "/x/${y}"
