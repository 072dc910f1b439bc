"""The database of a work directory: at any path, after the directory was moved or copied, and if it is read-only."""

import contextlib
import os
import shlex
import shutil
import sqlite3

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils
from mlflow_server import SAME, tracking_config, wait_for
from rank_processes import ONE_RANK

from dskd.compare.mlflow_link import mlflow_link
from dskd.errors import UserError
from dskd.tracking import Start, log_export, read_artifact, read_run, read_runs, start_tracking, tracking_uri

# All characters with a meaning in URIs, in SQLAlchemy, in shells or in file patterns.
ODD_NAME = 'a b what?mode=ro 100%41 #1 a&b=c;d é→ two\nlines it\'s "it" x:y@z [a]* \\'


@pytest.fixture
def work(tmp_path, no_runs):
    """Makes a work directory with a database within the test's folder."""

    def make(name="work"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        shutil.copyfile(no_runs, folder / "mlflow.db")
        return folder

    return make


def _train(folder, start=None, **tracking):
    """Tracks a run as training does, with the artifact `config.yaml`, and returns its id."""
    tracker = start_tracking(tracking_config(folder, **tracking), ONE_RANK, tags={}, start=start or SAME)
    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.finish("FINISHED")
    return tracker.run_id


def _end_process():
    """Makes MLflow forget where the artifacts of runs are, as in a new process."""
    utils._artifact_repos_cache.clear()


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_work_directory_of_any_name_has_its_database_and_artifacts(tmp_path):
    folder = tmp_path / ODD_NAME
    folder.mkdir()
    run_id = _train(folder)
    config = tracking_config(folder)
    (run,) = read_runs(config)
    assert (run.run_id, run.status) == (run_id, "FINISHED")
    assert b"workdir" in read_artifact(config, run_id, "config.yaml")
    assert list((folder / "mlartifacts").glob("*/artifacts/config.yaml"))
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == {".tracking-id", "checkpoints", "mlartifacts", "mlflow.db"}
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as opened:
        assert opened.execute("SELECT run_uuid FROM runs").fetchall() == [(run_id,)]
    # The command that `dskd compare` prints, as a shell reads it.
    *_, uri = shlex.split(mlflow_link(config, [run]).command)
    assert MlflowClient(uri).get_run(run_id).info.run_name == config.run


def test_a_name_that_no_uri_can_express_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"workdir: .*xff.* is not UTF-8"):
        _train("work")


def test_a_moved_work_directory_keeps_its_runs_and_artifacts(tmp_path, work):
    before, after = work("before?"), tmp_path / "after 100%41"
    run_id = _train(before)
    dead = start_tracking(tracking_config(before), ONE_RANK, tags={}, start=Start("of a dead process")).run_id
    wait_for(lambda: read_artifact(tracking_config(before), dead, "config.yaml"))
    before.rename(after)
    _end_process()
    config = tracking_config(after)
    for run in (run_id, dead):
        assert b"workdir" in read_artifact(config, run, "config.yaml")
    shutil.rmtree(after / "mlartifacts")
    assert _train(after, Start("x", 3, run_id)) == run_id  # as --resume
    new = _train(after, Start("another"))
    for run in (run_id, new):
        assert (after / "mlartifacts" / run / "artifacts" / "config.yaml").is_file()
    assert read_run(config, dead).status == "FAILED"  # although its tag names another directory
    assert list(tmp_path.iterdir()) == [after]


def test_a_work_directory_that_was_copied_leaves_the_first_one_alone(tmp_path, work):
    first, second = work("first"), tmp_path / "second"
    run_id = _train(first)
    shutil.copytree(first, second)
    _end_process()
    kept = _files(first)
    _train(second, Start("x", 3, run_id))
    new = _train(second, Start("another"))
    assert _files(first) == kept
    assert (second / "mlartifacts" / new / "artifacts" / "config.yaml").is_file()


def test_a_work_directory_under_a_second_path_is_left_as_it_is(tmp_path, work):
    folder, other = work(), tmp_path / "other"
    run_id = _train(folder)
    address = MlflowClient(tracking_uri(tracking_config(folder))).get_run(run_id).info.artifact_uri
    other.symlink_to(folder)
    assert read_artifact(tracking_config(other), run_id, "config.yaml")
    assert MlflowClient(tracking_uri(tracking_config(folder))).get_run(run_id).info.artifact_uri == address


def test_an_experiment_with_a_place_of_its_own_keeps_it(tmp_path, work):
    before, after = work("before"), tmp_path / "after"
    elsewhere = (tmp_path / "elsewhere").as_uri()
    MlflowClient(tracking_uri(tracking_config(before))).create_experiment("own", artifact_location=elsewhere)
    _train(before)
    before.rename(after)
    _end_process()
    read_runs(tracking_config(after))
    client = MlflowClient(tracking_uri(tracking_config(after)))
    assert client.get_experiment_by_name("own").artifact_location == elsewhere


def test_a_read_only_database_is_read_without_writing(tmp_path, work, read_only):
    before, after = work("before"), tmp_path / "after"
    run_id = _train(before)
    before.rename(after)
    _end_process()
    kept = _files(after)
    read_only(after)
    config = tracking_config(after)
    (run,) = read_runs(config)
    assert (run.run_id, run.metrics["train/loss"]) == (run_id, 1.0)
    assert b"workdir" in read_artifact(config, run_id, "config.yaml")
    assert _files(after) == kept


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(work):
    folder = work("a b")
    _train(folder)
    config = tracking_config(folder)
    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    client.delete_experiment(experiment.experiment_id)
    for attempt in (lambda: _train(folder), lambda: read_runs(config), lambda: read_runs(config, ["dskd"])):
        with pytest.raises(UserError, match=r"tracking\.experiment: 'dskd' was deleted in MLflow") as refused:
            attempt()
        assert refused.value.exit_code == 2
    command = shlex.split(str(refused.value).split("`")[1])
    assert command[:2] == [f"MLFLOW_TRACKING_URI={tracking_uri(config)}", "mlflow"]
    client.restore_experiment(command[-1])
    assert len(read_runs(config)) == 1


def test_a_file_system_needs_no_hard_links(work, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # as exFAT answers
    folder = work()
    run_id = _train(folder)
    log_export(tracking_config(folder), "dskd", run_id, folder)
    assert (folder / ".tracking-id").read_text()
