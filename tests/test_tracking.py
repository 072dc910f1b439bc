"""Against a real `mlflow server`, which is also taken away and brought back."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import BEFORE_TRAINING, free_port, run_program

from dskd.config import Config
from dskd.config_file import load_config
from dskd.distributed import World
from dskd.errors import UserError
from dskd.tracking import log_evaluation, read_artifact, read_history, read_run, read_runs, start_tracking
from dskd.tracking.context import flatten

WORLD = World(0, 1, 0, torch.device("cpu"))


class Server:
    """An MLflow server on a port of its own; what it was told survives a restart."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        pytest.fail("the MLflow server did not start")

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


def _config(tmp_path, **tracking):
    return Config(workdir=str(tmp_path), teacher={"path": "a/b"}, tracking=tracking)


@pytest.mark.slow
def test_a_server_that_goes_away_loses_nothing_and_stops_nobody(server, tmp_path, capsys):
    config = _config(tmp_path, uri=server.uri, experiment="outage")
    tracker = start_tracking(config, WORLD, tags={"world_size": "1"})
    tracker.log_metrics({"train/loss": 1.0}, 1)
    time.sleep(1)
    server.stop()
    started = time.monotonic()
    for step in range(2, 30):
        tracker.log_metrics({"train/loss": 1.0 / step, "train/ce": 2.0}, step)
    assert time.monotonic() - started < 1  # logging never waits for the server
    time.sleep(3)
    server.start()
    tracker.finish("FINISHED")
    assert capsys.readouterr().err.count("MLflow is away") == 1
    (run,) = read_runs(config)
    assert run.status == "FINISHED"
    assert read_history(config, run.run_id, "train/loss") == [(step, 1.0 / step) for step in range(1, 30)]


@pytest.mark.slow
def test_a_run_says_what_it_was(server, copy_of_tiny):
    tracking = {"uri": server.uri, "experiment": "over http"}
    config_path = copy_of_tiny(*BEFORE_TRAINING, tracking=tracking)
    run_program("train.py", config_path, ranks=2)
    config = load_config(config_path)
    (run,) = read_runs(config)
    assert (run.name, run.status) == ("dskd", "FINISHED")
    assert run.params["loss.sense_weight"] == "1.0"
    assert run.params["train.learning_rate"] == "0.001"
    assert run.tags["world_size"] == "2"
    for tag in ("dataset", "sense_dictionary", "teacher", "student", "git_commit"):
        assert len(run.tags[tag]) >= 40, tag
    for metric in (
        "loss",
        "ce",
        "kl",
        "sense",
        "sense_synonym",
        "sense_antonym",
        "sense_own",
        "grad_norm",
        "learning_rate",
    ):
        assert [step for step, _ in read_history(config, run.run_id, f"train/{metric}")] == list(range(1, 7)), metric
    assert run.metrics["speed/tokens_per_s"] > 0
    assert 0 < run.metrics["coverage/with_synonyms"] < run.metrics["coverage/with_senses"] <= 1
    from mlflow import MlflowClient

    files = {file.path for file in MlflowClient(server.uri).list_artifacts(run.run_id)}
    assert {"config.yaml", "environment.json", "manifest-senses.json", "manifest-shards-train.json"} <= files


@pytest.mark.slow
def test_an_unreachable_server_is_a_users_mistake_at_the_start(copy_of_tiny):
    config = copy_of_tiny(*BEFORE_TRAINING, tracking={"uri": f"http://someone:secret@127.0.0.1:{free_port()}"})
    finished = run_program("train.py", config, check=False)
    assert finished.exit_code == 2
    assert "error: tracking.uri: MLflow at http://***@127.0.0.1:" in finished.output
    assert "secret" not in finished.output
    assert "Traceback" not in finished.output


@pytest.mark.slow
def test_an_evaluation_is_kept_with_its_run_on_the_server(server, tmp_path):
    config = _config(tmp_path, uri=server.uri, experiment="evaluated")
    tracker = start_tracking(config, WORLD, tags={})
    tracker.finish("FINISHED")
    assert read_artifact(config, tracker.run_id, "evaluation/examples.parquet") is None
    (tmp_path / "examples.parquet").write_bytes(b"what each example scored")
    log_evaluation(config, tracker.run_id, {"accuracy": 0.5}, tmp_path / "examples.parquet", data="f" * 64)
    run = read_run(config, tracker.run_id)
    assert (run.name, run.experiment, run.metrics) == ("dskd", "evaluated", {"eval/accuracy": 0.5})
    assert run.tags["evaluation_data"] == "f" * 64
    assert read_artifact(config, run.run_id, "evaluation/examples.parquet") == b"what each example scored"
    assert read_run(config, "0" * 32) is None


def test_tracking_can_be_off_and_only_the_first_rank_tracks(tmp_path):
    for config, world in [
        (_config(tmp_path, enabled=False), WORLD),
        (_config(tmp_path), World(1, 2, 1, torch.device("cpu"))),
    ]:
        tracker = start_tracking(config, world, tags={})
        tracker.log_metrics({"a": 1.0}, 1)
        tracker.finish("FINISHED")
        assert tracker.run_id is None
    assert not list(tmp_path.iterdir())


def test_an_sqlite_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database, but long enough to be looked at" * 30)
    with pytest.raises(UserError, match=r"tracking.uri: MLflow at sqlite:"):
        start_tracking(_config(tmp_path), WORLD, tags={})


def test_nested_settings_become_dotted_parameters():
    assert flatten({"a": {"b": 1, "c": {}}, "d": None, "e": [1, "x"], "f": "text"}) == {
        "a.b": "1",
        "a.c": "{}",
        "d": "null",
        "e": '[1, "x"]',
        "f": "text",
    }
