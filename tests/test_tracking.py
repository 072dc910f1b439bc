"""Against a real `mlflow server`, which is also taken away and brought back."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import mlflow
import pytest
import torch
import yaml
from conftest import BEFORE_TRAINING, ONE_RANK, TINY, finish, fork_ranks, free_port, run_program
from forked_rank import node_namespaces, run_launcher_on_node, why_no_nodes
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from dskd import checkpoint
from dskd.config import Config
from dskd.config_file import load_config
from dskd.distributed import launcher_job
from dskd.errors import UserError
from dskd.manifest import read_manifest
from dskd.tracking import (
    Start,
    describe_dataset,
    log_evaluation,
    log_export,
    read_artifact,
    read_history,
    read_run,
    read_runs,
    start_tracking,
    tracker,
)
from dskd.tracking.context import flatten
from dskd.tracking.system_metrics import name_nodes

SAME = Start(recipe="the same")


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
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        self.stop()
        pytest.fail("the MLflow server did not start")

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None


class Link:
    """A way to a server that can be cut and mended: while it is cut, connections are refused."""

    def __init__(self, server):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._server = ("127.0.0.1", server.port)
        self._listener = None
        self._open = []

    def mend(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self):
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in self._open:
            end.close()
        self._open.clear()

    def _accept(self, listener):
        try:
            while True:
                ends = [listener.accept()[0], socket.create_connection(self._server)]
                self._open += ends
                threading.Thread(target=self._forward, args=ends, daemon=True).start()
        except OSError:  # it was cut
            return

    def _forward(self, one, other):
        try:
            while True:
                for ready in select.select([one, other], [], [])[0]:
                    if not (data := ready.recv(65536)):
                        return
                    (other if ready is one else one).sendall(data)
        except (OSError, ValueError):
            return
        finally:
            one.close()
            other.close()


@pytest.fixture
def link(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracker, "_RETRY_AFTER_S", 0.1)
    monkeypatch.setattr(tracker, "_FLUSH_TIMEOUT_IN_HASTE_S", 0.5)
    link = Link(server)
    link.mend()
    yield link
    link.cut()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


def _config(tmp_path, **tracking):
    tracking = {"system_metrics": False, **tracking}
    return Config(workdir=str(tmp_path), teacher={"path": "a/b"}, tracking=tracking)


def _points(uri, run_id, metric):
    """(step, value) of a metric in the order in which MLflow was told."""
    points = MlflowClient(uri).get_metric_history(run_id, metric)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: point.timestamp)]


def _wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_goes_away_loses_nothing_and_stops_nobody(server, tmp_path, capsys):
    config = _config(tmp_path, uri=server.uri, experiment="outage")
    tracking = start_tracking(config, ONE_RANK, tags={"world_size": "1"})
    tracking.log_metrics({"train/loss": 1.0}, 1)
    time.sleep(1)
    server.stop()
    started = time.monotonic()
    for step in range(2, 30):
        tracking.log_metrics({"train/loss": 1.0 / step, "train/ce": 2.0}, step)
    assert time.monotonic() - started < 1  # logging never waits for the server
    time.sleep(3)
    server.start()
    tracking.finish("FINISHED")
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
    client = MlflowClient(server.uri)
    files = {file.path for file in client.list_artifacts(run.run_id)}
    assert {"config.yaml", "environment.json", "manifest-senses.json", "manifest-shards-train.json"} <= files
    picture = client.download_artifacts(run.run_id, "loss.png")
    assert plt.imread(picture).std() > 0  # something is drawn
    hours = [value for _, value in read_history(config, run.run_id, "cost/device_hours")]
    assert hours == sorted(hours)
    assert hours[0] > 0
    assert checkpoint.latest(config).manifest.facts["device_hours"] == hours[-1]
    assert 0 < run.metrics[f"system/{socket.gethostname()}/system_memory_usage_percentage"] <= 100
    inputs = {one.dataset.name: one for one in client.get_run(run.run_id).inputs.dataset_inputs}
    assert set(inputs) == {"shards-train", "shards-validation", "sense-dictionary"}
    training = inputs["shards-train"]
    manifest = read_manifest(config.path("shards", "train"), "shards", made_by="")
    assert training.dataset.digest == manifest.digest[:36]
    assert json.loads(training.dataset.profile)["samples"] == manifest.facts["samples"]
    assert json.loads(training.dataset.source)["uri"] == str(config.path("shards", "train"))
    assert '"synonym_ids' in json.loads(training.dataset.schema)["mlflow_tensorspec"]["features"]
    assert [(tag.key, tag.value) for tag in training.tags] == [("mlflow.data.context", "training")]


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
    tracking = start_tracking(config, ONE_RANK, tags={}, start=SAME)
    tracking.finish("FINISHED")
    assert read_artifact(config, tracking.run_id, "evaluation/examples.parquet") is None
    examples = tmp_path / "examples.parquet"
    examples.write_bytes(b"what each example scored")
    log_evaluation(config, "dskd", tracking.run_id, {"accuracy": 0.5}, examples, data="f" * 64, step=7)
    run = read_run(config, tracking.run_id)
    assert (run.name, run.experiment, run.metrics["eval/accuracy"]) == ("dskd", "evaluated", 0.5)
    assert read_history(config, run.run_id, "eval/accuracy") == [(7, 0.5)]
    assert run.tags["evaluation_data"] == "f" * 64
    assert read_artifact(config, run.run_id, "evaluation/examples.parquet") == b"what each example scored"
    assert read_run(config, "0" * 32) is None


def test_tracking_can_be_off(tmp_path):
    tracking = start_tracking(_config(tmp_path, enabled=False), ONE_RANK, tags={}, start=Start(device_hours=2.0))
    tracking.log_metrics({"a": 1.0}, 1)
    tracking.before_checkpoint()
    tracking.finish("FINISHED")
    assert (tracking.run_id, tracking.device_hours) == (None, 2.0)
    assert not list(tmp_path.iterdir())


def test_looking_where_nothing_was_tracked_makes_no_database(tmp_path):
    config = _config(tmp_path)
    assert read_runs(config) == []
    for look in (lambda: read_runs(config, ["other"]), lambda: read_run(config, "0" * 32)):
        with pytest.raises(UserError, match=r"mlflow.db: nothing was tracked here yet; train first"):
            look()
    assert list(tmp_path.iterdir()) == []


def test_an_sqlite_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database, but long enough to be looked at" * 30)
    with pytest.raises(UserError, match=r"tracking.uri: MLflow at sqlite:"):
        start_tracking(_config(tmp_path), ONE_RANK, tags={})


def test_nested_settings_become_dotted_parameters():
    assert flatten({"a": {"b": 1, "c": {}}, "d": None, "e": [1, "x"], "f": "text"}) == {
        "a.b": "1",
        "a.c": "{}",
        "d": "null",
        "e": '[1, "x"]',
        "f": "text",
    }


@pytest.mark.slow
def test_what_a_run_leaves_unsent_is_sent_by_the_next_start_and_by_export(link, tmp_path, capsys):
    config = _config(tmp_path, uri=link.uri, experiment="unsent")
    first = start_tracking(config, ONE_RANK, tags={"world_size": "1"}, start=SAME)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step), "cost/device_hours": step / 10}, step)
    _wait_for(lambda: len(_points(link.uri, first.run_id, "train/loss")) == 3)
    link.cut()
    first.log_metrics({"train/loss": 4.0}, 4)
    first.before_checkpoint()
    unsent = checkpoint.folder(config) / "tracking" / "unsent.jsonl"
    assert '["train/loss", 4.0,' in unsent.read_text()  # a killed process has lost nothing of what the checkpoint has
    first.log_metrics({"train/loss": 5.0}, 5)
    first.finish("KILLED")
    assert f"are kept in {unsent}" in capsys.readouterr().err

    # From a checkpoint of step 4, while the server is still away. What is trained again is told once.
    resumed = Start("the same", 4, first.run_id, device_hours=0.7)
    second = start_tracking(config, ONE_RANK, tags={"world_size": "4"}, start=resumed)
    assert (second.run_id, second.device_hours) == (first.run_id, 0.7)
    for step in (5, 6, 7):
        second.log_metrics({"train/loss": 5.5 if step == 5 else float(step)}, step)
    second.finish("FINISHED")
    link.mend()
    log_export(config, config.run, second.run_id, tmp_path)

    (run,) = read_runs(config)
    assert _points(link.uri, run.run_id, "train/loss") == [(step, float(step)) for step in range(1, 8)]
    assert (run.status, run.tags["restarts"], run.tags["world_size"]) == ("FINISHED", "1", "4")
    assert run.tags["restart.1"].startswith("from step 4, after it was KILLED; world_size 4; ")
    files = {file.path for file in MlflowClient(link.uri).list_artifacts(run.run_id)}
    assert {"config.yaml", "environment.json", "loss.png"} <= files
    assert not unsent.exists()


@pytest.mark.slow
def test_a_run_that_died_is_gone_on_with_or_marked_so(link, tmp_path):
    config = _config(tmp_path / "one", uri=link.uri, experiment="deaths")
    elsewhere = start_tracking(_config(tmp_path / "two", uri=link.uri, experiment="deaths"), ONE_RANK, tags={})
    dead = start_tracking(config, ONE_RANK, tags={}, start=SAME)
    dead.log_metrics({"cost/device_hours": 3.0}, 1)
    _wait_for(lambda: _points(link.uri, dead.run_id, "cost/device_hours"))

    def statuses():
        return {run.run_id: run.status for run in read_runs(config)}

    # Before its first checkpoint a run is known by its folder. What was paid for behind a checkpoint counts.
    again = start_tracking(config, ONE_RANK, tags={}, start=SAME)
    assert (again.run_id, again.device_hours) == (dead.run_id, 3.0)
    client = MlflowClient(link.uri)
    _wait_for(lambda: "restarts" in client.get_run(dead.run_id).data.tags)
    assert client.get_run(dead.run_id).data.tags["restart.1"].startswith("from step 0, after its process died; ")

    other = start_tracking(config, ONE_RANK, tags={}, start=Start(recipe="another"))
    overwriting = start_tracking(config, ONE_RANK, tags={}, start=Start(recipe="another", overwrite=True))
    assert len({dead.run_id, other.run_id, overwriting.run_id}) == 3
    # The second of them finds a message of `again` that was written to disk, and delivered since.
    alive = {overwriting.run_id: "RUNNING", elsewhere.run_id: "RUNNING"}
    _wait_for(lambda: statuses() == alive | {dead.run_id: "FAILED", other.run_id: "FAILED"})
    assert f"by run {overwriting.run_id}" in client.get_run(other.run_id).data.tags["died"]
    # A checkpoint's run comes before the folder's.
    last = start_tracking(config, ONE_RANK, tags={}, start=Start("another", 2, dead.run_id))
    assert last.run_id == dead.run_id
    last.finish("FINISHED")
    assert statuses()[dead.run_id] == "FINISHED"
    assert statuses()[overwriting.run_id] == "FAILED"
    for one in (dead, again, other, overwriting, elsewhere):
        one.finish("FAILED")


@pytest.mark.slow
def test_runs_that_start_at_once_have_one_parent_with_their_status(link, tmp_path):
    configs = [
        _config(tmp_path / name, uri=link.uri, experiment="sweep", parent="three seeds") for name in ("a", "b", "c")
    ]
    with ThreadPoolExecutor() as pool:
        children = list(pool.map(lambda config: start_tracking(config, ONE_RANK, tags={}), configs))
    client = MlflowClient(link.uri)
    (parent_id,) = {client.get_run(child.run_id).data.tags["mlflow.parentRunId"] for child in children}

    def parent():
        (found,) = client.search_runs(
            [client.get_experiment_by_name("sweep").experiment_id], "tags.`dskd.kind` = 'parent'"
        )
        assert (found.info.run_id, found.info.run_name) == (parent_id, "three seeds")
        return found.info.status

    assert parent() == "RUNNING"
    children[0].finish("FINISHED")
    children[1].finish("KILLED")
    assert parent() == "RUNNING"
    children[2].finish("FINISHED")
    assert parent() == "KILLED"
    again = start_tracking(configs[1], ONE_RANK, tags={}, start=Start(run_id=children[1].run_id))
    again.finish("FINISHED")
    assert parent() == "FINISHED"
    assert len(read_runs(configs[0])) == 3  # the parent was trained by nobody


@pytest.mark.slow
def test_the_exported_student_is_a_model_of_its_run(link, tiny, tmp_path):
    work = yaml.safe_load(tiny.read_text())["workdir"]
    shutil.copytree(f"{work}/export/dskd", tmp_path / "export" / "dskd")
    config = _config(tmp_path, uri=link.uri, experiment="models", log_model=True)
    tracking = start_tracking(config, ONE_RANK, tags={})
    tracking.finish("FINISHED")
    for _ in range(2):  # the second time it is there
        log_export(config, "dskd", tracking.run_id, tmp_path / "export" / "dskd")
    client = MlflowClient(link.uri)
    run = client.get_run(tracking.run_id)
    assert run.info.status == "FINISHED"
    assert mlflow.active_run() is None
    (output,) = run.outputs.model_outputs
    loaded = mlflow.transformers.load_model(f"models:/{output.model_id}")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "dskd")
    ids = torch.tensor([[5, 17, 300, 4]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, expected(ids).logits)


@pytest.mark.slow
def test_an_evaluation_that_is_repeated_leaves_one_table(link, tmp_path):
    config = _config(tmp_path, uri=link.uri, experiment="tables")
    tracking = start_tracking(config, ONE_RANK, tags={})
    tracking.finish("FINISHED")
    table, text = tmp_path / "samples.json", tmp_path / "samples.md"
    text.write_text("| a |")
    for said in ("first", "second"):
        table.write_text(json.dumps({"columns": ["prompt", "dskd"], "data": [["a", said]]}))
        more = {"step": 7, "tables": [table], "files": [text]}
        log_evaluation(config, "dskd", tracking.run_id, {"perplexity": 3.5}, text, data="f" * 64, **more)
    client = MlflowClient(link.uri)
    experiment = client.get_experiment_by_name("tables").experiment_id
    mlflow.set_tracking_uri(link.uri)
    assert client.load_table(experiment, "samples.json").to_dict("records") == [{"prompt": "a", "dskd": "second"}]
    assert "samples.md" in {file.path for file in client.list_artifacts(tracking.run_id)}
    assert read_history(config, tracking.run_id, "eval/perplexity") == [(7, 3.5)]


@pytest.mark.slow
def test_four_ranks_on_two_nodes_are_one_run_through_a_death_and_an_outage(server, copy_of_tiny, tmp_path):
    if reason := why_no_nodes():
        pytest.skip(reason)
    link = Link(server)
    link.mend()
    tracking = {"uri": link.uri, "experiment": "two nodes", "system_metrics_every_s": 1}
    settings = {**TINY["train"], "steps": 12, "checkpoint_every": 2, "collective_timeout_s": 300}
    path = copy_of_tiny(*BEFORE_TRAINING, train=settings, tracking=tracking)
    config = load_config(path)
    nodes = node_namespaces(tmp_path, ["left", "right"])

    def start(*arguments):
        return fork_ranks(run_launcher_on_node, "train.py", ["--config", str(path), *arguments], nodes, ranks=4)

    ranks = start()
    try:
        _wait_for(lambda: checkpoint.latest(config) is not None, 600)
        link.cut()
        seen = checkpoint.latest(config).step
        _wait_for(lambda: checkpoint.latest(config).step >= seen + 2, 600)
    finally:
        for rank in ranks:
            rank.kill()
    died_behind = checkpoint.latest(config).step
    assert died_behind < 12
    ranks = start("--resume")
    try:
        _wait_for(lambda: "MLflow is away" in ranks[0].output, 600)
        _wait_for(lambda: checkpoint.latest(config).step > died_behind, 600)
    finally:
        link.mend()
    finish(ranks, 600)

    client = MlflowClient(server.uri)
    (run,) = read_runs(config)
    assert (run.status, run.tags["restarts"], run.tags["world_size"]) == ("FINISHED", "1", "4")
    assert run.tags["restart.1"].startswith(f"from step {died_behind}, after its process died; world_size 4; ")
    assert [step for step, _ in _points(server.uri, run.run_id, "train/loss")] == list(range(1, 13))
    for metric in run.metrics:
        steps = [step for step, _ in _points(server.uri, run.run_id, metric)]
        assert steps == sorted(set(steps)), metric
    nodes_seen = {metric.split("/")[1] for metric in run.metrics if metric.startswith("system/")}
    assert nodes_seen == {"left", "right"}
    for node in nodes_seen:
        assert len(_points(server.uri, run.run_id, f"system/{node}/cpu_utilization_percentage")) > 1
    assert len(client.get_run(run.run_id).inputs.dataset_inputs) == 3
    assert {"config.yaml", "loss.png"} <= {file.path for file in client.list_artifacts(run.run_id)}
    assert not (checkpoint.folder(config) / "tracking" / "unsent.jsonl").exists()


def test_datasets_are_described_with_digests_that_mlflow_takes_and_no_secrets(tiny):
    config = load_config(tiny)
    manifest = read_manifest(config.path("shards", "train"), "shards", made_by="")
    described = describe_dataset("shards", "training", "s3://key:secret@bucket/shards", manifest, {"a": "int32"})
    assert described["source"] == "s3://***@bucket/shards"
    assert described["digest"] == manifest.digest[:36]


def test_nodes_of_one_name_get_a_number():
    assert name_nodes(["a", "b", "a"]) == ["a-0", "b", "a-2"]
    assert name_nodes(["a", "b"]) == ["a", "b"]


def test_the_launchers_job_is_told_as_it_is_called_there(monkeypatch):
    for name in [*(name for name in os.environ if name.startswith("SLURM_")), "JOB_COMPLETION_INDEX"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert launcher_job() == {}
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("DSKD_JOB", "dskd")
    assert launcher_job() == {"scheduler": "kubernetes", "id": "dskd", "pod": socket.gethostname()}
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert launcher_job() == {"scheduler": "slurm", "id": "42", "restart": "3"}
