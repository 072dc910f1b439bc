"""The data that a real `mlflow server` receives about runs, their evaluations and their models."""

import json
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import mlflow
import pytest
import torch
import yaml
from config_files import write_config
from mlflow import MlflowClient
from mlflow_server import SAME, tracking_config
from rank_jobs import begin_tracking
from rank_processes import ONE_RANK, finish, fork_ranks, run_program
from tiny_work import BEFORE_TRAINING
from transformers import AutoModelForCausalLM

from dskd.artifacts.manifest import read_manifest
from dskd.cli import program
from dskd.config.reading import load_config
from dskd.distributed.rendezvous import free_port
from dskd.errors import UserError
from dskd.tracking import (
    Start,
    context,
    describe_dataset,
    log_export,
    log_results,
    read_artifact,
    read_history,
    read_run,
    read_runs,
    start_tracking,
)
from dskd.tracking.context import flatten
from dskd.tracking.system_metrics import name_nodes
from dskd.training.checkpoints import checkpoint


@pytest.mark.slow
def test_a_run_records_its_settings_metrics_and_inputs(server, copy_of_tiny):
    tracking = {"uri": server.uri, "experiment": "over http"}
    config_path = copy_of_tiny(*BEFORE_TRAINING, tracking=tracking)
    run_program("train.py", config_path)
    config = load_config(config_path)
    (run,) = read_runs(config)
    assert (run.name, run.status) == ("dskd", "FINISHED")
    assert run.params["loss.sense_weight"] == "1.0"
    assert run.params["train.learning_rate"] == "0.001"
    assert run.tags["world_size"] == "1"
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
    assert plt.imread(picture).std() > 0  # the picture is not blank
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


def test_an_unreachable_server_is_reported_at_the_start_as_an_outage(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = tracking_config(tmp_path, uri=f"http://someone:secret@127.0.0.1:{free_port()}")
    assert program.run(lambda: start_tracking(config, ONE_RANK, tags={})) == 1
    printed = capsys.readouterr().err
    assert "error: tracking.uri: MLflow at http://***@127.0.0.1:" in printed
    assert "secret" not in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_an_evaluation_is_kept_with_its_run_on_the_server(server, tmp_path):
    config = tracking_config(tmp_path, uri=server.uri, experiment="evaluated")
    tracking = start_tracking(config, ONE_RANK, tags={}, start=SAME)
    tracking.finish("FINISHED")
    assert read_artifact(config, tracking.run_id, "evaluation/examples.parquet") is None
    examples = tmp_path / "examples.parquet"
    examples.write_bytes(b"what each example scored")
    log_results(config, "dskd", tracking.run_id, "evaluation", {"accuracy": 0.5}, examples, data="f" * 64, step=7)
    run = read_run(config, tracking.run_id)
    assert (run.name, run.experiment, run.metrics["eval/accuracy"]) == ("dskd", "evaluated", 0.5)
    assert read_history(config, run.run_id, "eval/accuracy") == [(7, 0.5)]
    assert run.tags["evaluation_data"] == "f" * 64
    assert read_artifact(config, run.run_id, "evaluation/examples.parquet") == b"what each example scored"
    assert read_run(config, "0" * 32) is None


def test_tracking_can_be_off(tmp_path):
    tracking = start_tracking(
        tracking_config(tmp_path, enabled=False), ONE_RANK, tags={}, start=Start(device_hours=2.0)
    )
    tracking.log_metrics({"a": 1.0}, 1)
    tracking.save_unsent()
    tracking.finish("FINISHED")
    assert (tracking.run_id, tracking.device_hours) == (None, 2.0)
    assert not list(tmp_path.iterdir())


def test_reading_an_untracked_work_directory_creates_no_database(tmp_path):
    config = tracking_config(tmp_path)
    assert read_runs(config) == []
    for look in (lambda: read_runs(config, ["other"]), lambda: read_run(config, "0" * 32)):
        with pytest.raises(UserError, match=r"mlflow.db: no run was tracked here yet; train first"):
            look()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_runs_that_start_at_once_on_a_new_work_directory_make_one_database(tmp_path):
    base = {"workdir": str(tmp_path), "teacher": {"path": "t"}, "tracking": {"system_metrics": False}}
    path = write_config(tmp_path / "x.yaml", base)
    names = ["a", "b", "c"]
    (tmp_path / ".mlflow.db.new").write_bytes(b"half a database, of a process that was killed")
    at = time.time() + 2
    finish([rank for name in names for rank in fork_ranks(begin_tracking, path, name, at)], 120)
    assert sorted((run.name, run.status) for run in read_runs(load_config(path))) == [
        (name, "FINISHED") for name in names
    ]
    assert not [*tmp_path.glob(".mlflow.db*")]


def test_a_file_that_is_not_an_sqlite_database_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database, but long enough to be looked at" * 30)
    with pytest.raises(UserError, match=r"tracking.uri: MLflow at sqlite:"):
        start_tracking(tracking_config(tmp_path), ONE_RANK, tags={})


def test_nested_settings_become_dotted_parameters():
    assert flatten({"a": {"b": 1, "c": {}}, "d": None, "e": [1, "x"], "f": "text"}) == {
        "a.b": "1",
        "a.c": "{}",
        "d": "null",
        "e": '[1, "x"]',
        "f": "text",
    }


@pytest.mark.slow
def test_runs_that_start_at_once_have_one_parent_with_their_status(link, tmp_path):
    configs = [
        tracking_config(tmp_path / name, uri=link.uri, experiment="sweep", parent="three seeds")
        for name in ("a", "b", "c")
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
    assert len(read_runs(configs[0])) == 3  # a parent is not trained


@pytest.mark.slow
def test_the_exported_student_is_a_model_of_its_run(link, tiny, tmp_path):
    work = yaml.safe_load(tiny.read_text())["workdir"]
    shutil.copytree(f"{work}/export/dskd", tmp_path / "export" / "dskd")
    config = tracking_config(tmp_path, uri=link.uri, experiment="models", log_model=True)
    tracking = start_tracking(config, ONE_RANK, tags={})
    tracking.finish("FINISHED")
    for _ in range(2):  # the second time MLflow already has it
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
    config = tracking_config(tmp_path, uri=link.uri, experiment="tables")
    tracking = start_tracking(config, ONE_RANK, tags={})
    tracking.finish("FINISHED")
    table, text = tmp_path / "samples.json", tmp_path / "samples.md"
    text.write_text("| a |")
    for continuation in ("first", "second"):
        table.write_text(json.dumps({"columns": ["prompt", "dskd"], "data": [["a", continuation]]}))
        more = {"step": 7, "tables": [table], "files": [text]}
        log_results(config, "dskd", tracking.run_id, "evaluation", {"perplexity": 3.5}, text, data="f" * 64, **more)
    client = MlflowClient(link.uri)
    experiment = client.get_experiment_by_name("tables").experiment_id
    mlflow.set_tracking_uri(link.uri)
    assert client.load_table(experiment, "samples.json").to_dict("records") == [{"prompt": "a", "dskd": "second"}]
    assert "samples.md" in {file.path for file in client.list_artifacts(tracking.run_id)}
    assert read_history(config, tracking.run_id, "eval/perplexity") == [(7, 3.5)]


def test_datasets_are_described_with_digests_that_mlflow_takes_and_no_secrets(tiny):
    config = load_config(tiny)
    manifest = read_manifest(config.path("shards", "train"), "shards", made_by="")
    described = describe_dataset("shards", "training", "s3://key:secret@bucket/shards", manifest, {"a": "int32"})
    assert described["source"] == "s3://***@bucket/shards"
    assert described["digest"] == manifest.digest[:36]


def test_a_run_is_recorded_with_the_manifests_of_complete_artifacts(tmp_path):
    config = tracking_config(tmp_path)
    for name in ("senses", ".senses.partial", "shards/train", "shards/.train.old"):
        config.path(name).mkdir(parents=True)
        (config.path(name) / "manifest.json").write_text("{}")
    (tmp_path / "context").mkdir()
    names = {path.name for path in context.write_context(config, tmp_path / "context")}
    assert names == {"config.yaml", "environment.json", "manifest-senses.json", "manifest-shards-train.json"}


def test_the_commit_is_the_checkouts_or_the_one_that_an_image_was_built_from(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(context, "_PROJECT", tmp_path)
    assert context.git_commit() is None
    git("init")
    (tmp_path / "file").touch()
    git("add", "file")
    git("commit", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert context.git_commit() == commit
    (tmp_path / "file").write_text("changed")
    assert context.git_commit() == f"{commit}-dirty"
    (tmp_path / "COMMIT").write_text("0123\n")  # as cluster/docker/Dockerfile writes it
    assert context.git_commit() == "0123"


def test_nodes_with_the_same_name_get_numbers():
    assert name_nodes(["a", "b", "a"]) == ["a-0", "b", "a-2"]
    assert name_nodes(["a", "b"]) == ["a", "b"]
