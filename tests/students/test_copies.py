"""The student's copies of chat template and generation config, after those of its source changed."""

import shutil

import pytest
from config_files import write_config
from tiny_models import save_model

from dskd import pipeline
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe, read_manifest
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.models.files.folder import find_teacher
from dskd.students.copies import changed_copies, source_of, warn_of_old_copies
from dskd.students.student import build_student

STUDENTS = {
    "cut": {"layers": 2, "train_layers": 1},
    "path": {"path": "pretrained"},
    "from_config": {"from_config": {"layers": 2, "hidden_size": 16, "heads": 2}},
}


@pytest.fixture(params=STUDENTS)
def config_file(request, tmp_path, monkeypatch):
    """Returns the path of a config whose student is made, and is of each origin in turn."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "teacher")
    shutil.copytree(tmp_path / "teacher", tmp_path / "pretrained")
    values = {
        "workdir": str(tmp_path / "work"),
        "teacher": {"path": str(tmp_path / "teacher")},
        "student": STUDENTS[request.param],
        "corpus": {"sequence_length": 48},
    }
    file = tmp_path / "mine.yaml"
    write_config(file, values)
    build_student(load_config(file))
    assert _is_current(file)
    return file


def _is_current(file):
    config = load_config(file)
    stages = pipeline.plan_stages(config, file, [], lambda: find_teacher(config))
    return next(stage for stage in stages if stage.name == "student").is_current()


def _source(config):
    return source_of(config, find_teacher(config))


def _digest(config):
    return read_manifest(config.path("student"), "student").digest


def test_a_student_is_made_again_for_another_template(config_file):
    config = load_config(config_file)
    source, before = _source(config), _digest(config)
    (source / "chat_template.jinja").write_text("new")
    assert changed_copies(config, source) == ["chat template"]
    assert not _is_current(config_file)
    build_student(config)
    assert (config.path("student") / "chat_template.jinja").read_text() == "new"
    assert _is_current(config_file)
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert changed_copies(config, source) == ["generation config"]
    assert not _is_current(config_file)
    build_student(config)
    assert _is_current(config_file)
    (source / "chat_template.jinja").unlink()
    assert changed_copies(config, source) == ["chat template"]
    assert _digest(config) != before


def test_training_outlives_another_template(config_file, capsys):
    config = load_config(config_file)
    config.path("checkpoints", "dskd", "step-00000003").mkdir(parents=True)
    (_source(config) / "chat_template.jinja").write_text("new")
    assert _is_current(config_file)
    assert "the chat template changed after" in capsys.readouterr().err
    sequences = _make(config, "sequences", {"corpus": "a"})
    _make(config, "shards", {"sequences": sequences.digest})
    assert _is_current(config_file)
    _make(config, "shards", {"sequences": "other"})  # training repeats anyway
    assert not _is_current(config_file)


def test_training_that_starts_by_itself_warns_too(config_file, capsys):
    """Training alone makes no student again. A pretrained model may be gone by then: the student is a copy."""
    config = load_config(config_file)
    source, teacher = _source(config), find_teacher(config)
    warn_of_old_copies(config, teacher)
    assert capsys.readouterr().err == ""
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    warn_of_old_copies(config, teacher)
    printed = capsys.readouterr().err
    assert f"{source}: the generation config changed after" in printed
    assert "make the student again with `dskd student --config FILE`" in printed
    shutil.rmtree(source)
    warn_of_old_copies(config, teacher)
    assert capsys.readouterr().err == ""


def _make(config: Config, kind, inputs):
    folder = config.path(kind, "train") if kind == "shards" else config.path(kind)
    with build_artifact(folder, Recipe(kind, inputs)) as building:
        (building.folder / "file").write_text(kind)
    return read_manifest(folder, kind)
