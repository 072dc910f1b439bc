"""Reading a configuration: overrides, lines of problems, and paths."""

import pytest
import yaml
from config_files import MINIMAL, write_config
from repository import REPOSITORY

from dskd.config.reading import differences, load_config
from dskd.errors import UserError

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


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
def test_every_typo_in_a_shipped_config_is_reported(path, tmp_path):
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = [key for key in _keys(data) if not (key[0] == "runs" and len(key) == 2)]
    assert len(keys) > 20
    for key in keys:
        with pytest.raises(UserError) as error:
            load_config(write_config(tmp_path, _renamed(data, key)))
        assert f"{key[-1]}x" in str(error.value), key


def test_all_problems_are_reported_at_once_with_their_lines(tmp_path):
    path = write_config(
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
    parts = (
        f"{path}:4: teacher.offlaod: unknown key; did you mean teacher.offload?",
        f"{path}:6: train.learning_rate:",
        f"{path}:7: train.steps:",
        f"{path}:8: loss.sens_weight: unknown key; did you mean loss.sense_weight?",
        "override 'train.epochs=0'",
        "'nonsense': an override is section.key=value",
        "override 'senses.k=true'",
    )
    places = [message.find(part) for part in parts]
    assert places == sorted(places)  # by line, then in the order of the overrides
    assert -1 not in places


def test_overrides_win_over_runs_and_runs_over_the_file(tmp_path):
    path = write_config(
        tmp_path,
        {**MINIMAL, "loss": {"margin": 2.0, "kd_weight": 0.1}, "run": "a", "runs": {"a": {"loss": {"margin": 3.0}}}},
    )
    config = load_config(path, ["loss.kd_weight=0.5"])
    assert (config.loss.margin, config.loss.kd_weight) == (3.0, 0.5)
    assert load_config(path, ["loss.margin=4"]).loss.margin == 4.0


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match="there is no such config file"):
        load_config(tmp_path / "none.yaml")


def test_differences_have_dotted_keys():
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})) == [
        ("a.c", 2, 3),
        ("d", None, 4),
    ]


def test_variables_are_expanded_in_paths_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = write_config(
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


def test_unset_environment_variables_are_reported(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    path = write_config(
        tmp_path,
        {**MINIMAL, "workdir": "$NO_SUCH/x", "corpus": {"source": "files", "train": ["${NO_SUCH}"]}},
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
    ("path", "message"),
    [
        ("${HOME:-/x}/y", r"has a \$\{ without a name and \}"),
        ("/x/${", r"has a \$\{ without a name and \}"),
        ("~no-such-user/x", "the home folder of a user that this machine does not know"),
        (f"/x/{'é' * 200}/y", "has 400 bytes, and a file's name has at most 255"),
        ("/x" * 3000, "has 6,000 bytes, and a path has at most 4,095"),
        ("/x/\0y", "cannot contain the character NUL"),
    ],
)
def test_impossible_paths_are_refused_with_their_keys(tmp_path, path, message):
    with pytest.raises(UserError, match=rf"config\.yaml:\d+: workdir: .*{message}"):
        load_config(write_config(tmp_path, {"workdir": path, "teacher": {"path": "x"}}))
    with pytest.raises(UserError, match=rf"corpus\.train\.0: .*{message}"):
        load_config(write_config(tmp_path, {**MINIMAL, "corpus": {"source": "files", "train": [path]}}))
    assert load_config(write_config(tmp_path, {"workdir": "/x/$${y}", "teacher": {"path": "x"}})).workdir == "/x/${y}"
