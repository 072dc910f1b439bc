"""Outages and dead runs, with a real `mlflow server` that is cut off and connected again."""

import threading
import time

import pytest
from forked_rank import node_namespaces, run_launcher_on_node, why_no_nodes
from mlflow import MlflowClient
from mlflow_server import SAME, Link, points, tracking_config, wait_for
from rank_processes import ONE_RANK, finish, fork_ranks
from tiny_work import BEFORE_TRAINING, TINY

from dskd.artifacts import kinds
from dskd.config.reading import load_config
from dskd.tracking import Start, log_export, read_history, read_runs, start_tracking
from dskd.training.checkpoints import checkpoint


def _wait_for_line(text, capsys):
    """Waits until the text was printed; returns everything printed since capsys was last read."""
    printed = [""]
    wait_for(lambda: printed.append(capsys.readouterr().err) or text in "".join(printed))
    return "".join(printed)


@pytest.mark.slow
def test_an_outage_of_the_server_loses_nothing_and_stops_no_training(link, tmp_path, capsys):
    config = tracking_config(tmp_path, uri=link.uri, experiment="outage")
    tracking = start_tracking(config, ONE_RANK, tags={"world_size": "1"})
    tracking.log_metrics({"train/loss": 1.0}, 1)
    wait_for(lambda: points(link.uri, tracking.run_id, "train/loss"))
    link.cut()
    for step in range(2, 30):  # if logging waited for the server, the line that connects it again would not be reached
        tracking.log_metrics({"train/loss": 1.0 / step, "train/ce": 2.0}, step)
    printed = _wait_for_line("MLflow cannot be reached", capsys)
    time.sleep(0.5)  # in which it tries again several times
    link.mend()
    printed += _wait_for_line("MLflow can be reached again", capsys)  # otherwise `finish` would wait only briefly
    tracking.finish("FINISHED")
    assert (printed + capsys.readouterr().err).count("MLflow cannot be reached") == 1
    (run,) = read_runs(config)
    assert run.status == "FINISHED"
    assert read_history(config, run.run_id, "train/loss") == [(step, 1.0 / step) for step in range(1, 30)]


@pytest.mark.slow
def test_unsent_messages_are_sent_by_the_next_start_and_by_export(link, tmp_path, capsys):
    others = threading.enumerate()
    config = tracking_config(tmp_path, uri=link.uri, experiment="unsent")
    first = start_tracking(config, ONE_RANK, tags={"world_size": "1"}, start=SAME)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step), "cost/device_hours": step / 10}, step)
    wait_for(lambda: len(points(link.uri, first.run_id, "train/loss")) == 3)
    link.cut()
    first.log_metrics({"train/loss": 4.0}, 4)
    first.save_unsent()
    unsent = kinds.checkpoint_folder(config) / "tracking" / "unsent.jsonl"
    assert '["train/loss", 4.0,' in unsent.read_text()  # a killed process loses nothing from before its checkpoint
    first.log_metrics({"train/loss": 5.0}, 5)
    first.finish("KILLED")
    assert f"are kept in {unsent}" in capsys.readouterr().err

    # From a checkpoint of step 4, during the outage. Steps that are trained again are sent once.
    resumed = Start("the same", 4, first.run_id, device_hours=0.7)
    second = start_tracking(config, ONE_RANK, tags={"world_size": "4"}, curves={"train/loss": "loss"}, start=resumed)
    assert (second.run_id, second.device_hours) == (first.run_id, 0.7)
    for step in (5, 6, 7):
        second.log_metrics({"train/loss": 5.5 if step == 5 else float(step)}, step)
    _wait_for_line("MLflow cannot be reached", capsys)  # otherwise `finish` would wait for a minute
    second.finish("FINISHED")
    # As if their process had ended.
    wait_for(lambda: not [one for one in threading.enumerate() if one.name == "mlflow" and one not in others])
    link.mend()
    log_export(config, config.run, second.run_id, tmp_path)

    (run,) = read_runs(config)
    assert points(link.uri, run.run_id, "train/loss") == [(step, float(step)) for step in range(1, 8)]
    assert (run.status, run.tags["restarts"], run.tags["world_size"]) == ("FINISHED", "1", "4")
    assert run.tags["restart.1"].startswith("from step 4, after it was KILLED; world_size 4; ")
    files = {file.path for file in MlflowClient(link.uri).list_artifacts(run.run_id)}
    assert {"config.yaml", "environment.json", "loss.png"} <= files
    assert not unsent.exists()


@pytest.mark.slow
def test_a_dead_run_is_resumed_or_marked_as_failed(link, tmp_path):
    config = tracking_config(tmp_path / "one", uri=link.uri, experiment="deaths")
    elsewhere = start_tracking(tracking_config(tmp_path / "two", uri=link.uri, experiment="deaths"), ONE_RANK, tags={})
    dead = start_tracking(config, ONE_RANK, tags={}, start=SAME)
    dead.log_metrics({"cost/device_hours": 3.0}, 1)
    wait_for(lambda: points(link.uri, dead.run_id, "cost/device_hours"))

    def statuses():
        return {run.run_id: run.status for run in read_runs(config)}

    # Before its first checkpoint a run is found by its folder. Device hours after a checkpoint count.
    again = start_tracking(config, ONE_RANK, tags={}, start=SAME)
    assert (again.run_id, again.device_hours) == (dead.run_id, 3.0)
    client = MlflowClient(link.uri)
    wait_for(lambda: "restarts" in client.get_run(dead.run_id).data.tags)
    assert client.get_run(dead.run_id).data.tags["restart.1"].startswith("from step 0, after its process died; ")
    # All of these processes are alive, unlike a dead one, which could not mark others as dead.
    again._outbox.wait_until_empty(60)

    other = start_tracking(config, ONE_RANK, tags={}, start=Start(recipe="another"))
    other._outbox.wait_until_empty(60)
    overwriting = start_tracking(config, ONE_RANK, tags={}, start=Start(recipe="another", overwrite=True))
    assert len({dead.run_id, other.run_id, overwriting.run_id}) == 3
    # The second one reads a message of `again` from disk that has been delivered since.
    alive = {overwriting.run_id: "RUNNING", elsewhere.run_id: "RUNNING"}
    wait_for(lambda: statuses() == alive | {dead.run_id: "FAILED", other.run_id: "FAILED"})
    assert f"by run {overwriting.run_id}" in client.get_run(other.run_id).data.tags["died"]
    # All trackers here share a folder, in which one run at a time keeps its undelivered messages.
    for tracker_of_the_dead in (dead, again, other, overwriting):
        assert tracker_of_the_dead._outbox.wait_until_empty(60)
    # The run of the checkpoint takes precedence over that of the folder.
    last = start_tracking(config, ONE_RANK, tags={}, start=Start("another", 2, dead.run_id))
    assert last.run_id == dead.run_id
    last.finish("FINISHED")
    assert statuses()[dead.run_id] == "FINISHED"
    assert statuses()[overwriting.run_id] == "FAILED"
    for one in (dead, again, other, overwriting, elsewhere):
        one.finish("FAILED")


@pytest.mark.slow
def test_four_ranks_on_two_nodes_are_one_run_through_a_death_and_an_outage(server, copy_of_tiny, tmp_path):
    """They resume as two, one on each node."""
    if reason := why_no_nodes():
        pytest.skip(reason)
    link = Link(server)
    link.mend()
    tracking = {"uri": link.uri, "experiment": "two nodes", "system_metrics_every_s": 1}
    settings = {**TINY["train"], "steps": 12, "checkpoint_every": 2, "collective_timeout_s": 300}
    path = copy_of_tiny(*BEFORE_TRAINING, train=settings, tracking=tracking)
    config = load_config(path)
    nodes = node_namespaces(tmp_path, ["left", "right"])

    def start(ranks, *arguments):
        return fork_ranks(run_launcher_on_node, "train.py", ["--config", str(path), *arguments], nodes, ranks=ranks)

    ranks = start(4)
    try:
        wait_for(lambda: checkpoint.latest(config) is not None, 600)
        link.cut()
        seen = checkpoint.latest(config).step
        wait_for(lambda: checkpoint.latest(config).step >= seen + 2, 600)
    finally:
        for rank in ranks:
            rank.kill()
    last_saved_step = checkpoint.latest(config).step
    assert last_saved_step < 12
    ranks = start(2, "--resume")
    try:
        wait_for(lambda: "MLflow cannot be reached" in ranks[0].output, 600)
        wait_for(lambda: checkpoint.latest(config).step > last_saved_step, 600)
    finally:
        link.mend()
    finish(ranks, 600)

    client = MlflowClient(server.uri)
    (run,) = read_runs(config)
    assert (run.status, run.tags["restarts"], run.tags["world_size"]) == ("FINISHED", "1", "2")
    assert run.tags["restart.1"].startswith(f"from step {last_saved_step}, after its process died; world_size 2; ")
    assert [step for step, _ in points(server.uri, run.run_id, "train/loss")] == list(range(1, 13))
    for metric in run.metrics:
        steps = [step for step, _ in points(server.uri, run.run_id, metric)]
        assert steps == sorted(set(steps)), metric
    nodes_seen = {metric.split("/")[1] for metric in run.metrics if metric.startswith("system/")}
    assert nodes_seen == {"left", "right"}
    for node in nodes_seen:
        assert len(points(server.uri, run.run_id, f"system/{node}/cpu_utilization_percentage")) > 1
    assert len(client.get_run(run.run_id).inputs.dataset_inputs) == 3
    assert {"config.yaml", "loss.png"} <= {file.path for file in client.list_artifacts(run.run_id)}
    assert not (kinds.checkpoint_folder(config) / "tracking" / "unsent.jsonl").exists()
