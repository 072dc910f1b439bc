"""The MLflow run of a training: creating a new one, resuming an earlier one, and ending those of dead processes.

A killed process cannot report its end, and its run would stay RUNNING forever. Only the next start of the same run in
the same work directory knows better, because it holds the lock of that run (:func:`dskd.artifacts.lock.hold_lock`).
"""

import json
import shlex
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.files import make_folder, write_text
from dskd.artifacts.lock import hold_lock, release_lock
from dskd.config import Config
from dskd.errors import UserError
from dskd.tracking.client import tracking_uri, without_secrets
from dskd.tracking.context import flatten
from dskd.tracking.database import artifacts_folder

FOLDER, RUN_FILE = "tracking", "run.json"
PARENT = "parent"
KIND_TAG, WORK_DIRECTORY_TAG = "dskd.kind", "dskd.work_directory"
PARENT_TAG = "mlflow.parentRunId"
_ID_FILE = ".tracking-id"
_ID_PATIENCE_S = 60.0
_SETTLED_AFTER_S = 1.0


def run_folder(config: Config, run: str) -> Path:
    """Returns the folder of a run's record and unsent messages, which is next to its checkpoints."""
    return config.path(kinds.CHECKPOINT.folder, run, FOLDER)


def load_run(folder: Path) -> dict[str, Any] | None:
    """Returns the record of the last tracked run from `run.json`: `run_id`, `recipe`, `started_ms`; None if missing."""
    file = folder / RUN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def save_run(folder: Path, run_id: str, recipe: str, started_ms: int) -> None:
    """Writes `run.json`, so that even a run that dies before its first checkpoint can be resumed."""
    make_folder(folder)
    record = {"run_id": run_id, "recipe": recipe, "started_ms": started_ms}
    write_text(folder / RUN_FILE, f"{json.dumps(record, indent=2)}\n")


def find_run(client: Any, run_id: str) -> Any | None:
    """Returns MLflow's run with this id, or None if there is none or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def create_run(client: Any, config: Config, tags: Mapping[str, str]) -> Any:
    """Creates a run with the config's run name, in its experiment and under its parent."""
    experiment_id = _experiment_id(client, config)
    tags = {**tags, WORK_DIRECTORY_TAG: _work_directory(config)}
    if config.tracking.parent is not None:
        tags[PARENT_TAG] = _parent(client, experiment_id, config.tracking.parent)
    run = client.create_run(experiment_id, run_name=config.run, tags=tags)
    _log_params(client, run.info.run_id, config)
    refresh_parent(client, run.info.run_id)
    return run


def fail_dead_runs(client: Any, config: Config, name: str, *, keep: str) -> None:
    """Marks as FAILED all runs of this name and work directory that are still RUNNING, except the run `keep`."""
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        return
    # Filter by the work directory's tag below: it contains a path, and MLflow's filters cannot express every path.
    running = client.search_runs(
        [experiment.experiment_id], f"attributes.status = 'RUNNING' and attributes.run_name = '{name}'"
    )
    here = _work_directory(config)
    # A database in the work directory has only runs of this directory, even if it was moved since.
    is_own = config.tracking.uri is None
    for run in running:
        if run.info.run_id != keep and (is_own or run.data.tags.get(WORK_DIRECTORY_TAG) == here):
            note = f"found still running by run {keep} at {_now()}, when no process trained it any more"
            client.set_tag(run.info.run_id, "died", note)
            client.set_terminated(run.info.run_id, "FAILED")
            refresh_parent(client, run.info.run_id)


def note_restart(client: Any, run_id: str, restart: Mapping[str, Any]) -> None:
    """Marks a run as running again; records in tags from which step, after which end, and on which job."""
    from mlflow.entities import RunTag

    run = client.get_run(run_id)
    count = int(run.data.tags.get("restarts", 0))
    before = run.info.status
    ended = "its process died" if before == "RUNNING" else f"it was {before}"
    note = f"from step {restart['step']}, after {ended}; {restart['on']}; {restart['at']}"
    if any(restart["at"] in text for name, text in run.data.tags.items() if name.startswith("restart.")):
        return  # this message was delivered before
    tags = {**restart["tags"], "restarts": str(count + 1), f"restart.{count + 1}": note}
    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    refresh_parent(client, run_id)


def refresh_parent(client: Any, run_id: str) -> None:
    """Sets the status of a run's parent, if it has one, to the combined status of the parent's children."""
    run = client.get_run(run_id)
    parent_id = run.data.tags.get(PARENT_TAG)
    if parent_id is None or find_run(client, parent_id) is None:
        return
    reported = None
    # Repeat until the status is stable: if two children end at the same time, each may have seen the other running.
    while (status := _status_of_children(client, run.info.experiment_id, parent_id)) not in (reported, None):
        if status == "RUNNING":
            client.update_run(parent_id, status=status)
        else:
            client.set_terminated(parent_id, status)
        reported = status


def _status_of_children(client: Any, experiment_id: str, parent_id: str) -> str | None:
    """Returns RUNNING if a child runs, otherwise the worst end of any; None if no child has such a status."""
    children = client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{parent_id}'")
    statuses = {child.info.status for child in children}
    return next((status for status in ("RUNNING", "FAILED", "KILLED", "FINISHED") if status in statuses), None)


def _parent(client: Any, experiment_id: str, name: str) -> str:
    """Returns the id of the parent run with this name, and creates the run if there is none."""
    if existing := _parents(client, experiment_id, name):
        return existing[0]
    own_id = client.create_run(experiment_id, run_name=name, tags={KIND_TAG: PARENT}).info.run_id
    # Children that start at the same time may each create a parent. Once all of these are visible, all children choose
    # the same one.
    time.sleep(_SETTLED_AFTER_S)
    chosen = (_parents(client, experiment_id, name) or [own_id])[0]
    if chosen != own_id:
        client.delete_run(own_id)
    return chosen


def _parents(client: Any, experiment_id: str, name: str) -> list[str]:
    runs = client.search_runs([experiment_id], f"tags.`{KIND_TAG}` = '{PARENT}' and attributes.run_name = '{name}'")
    return [run.info.run_id for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))]


def _work_directory(config: Config) -> str:
    """Returns the path and the unique id of the work directory: one path can be two directories on two clusters."""
    file = config.path(_ID_FILE)
    if not file.is_file():
        # Created under a lock, not as a hard link to a file of this process: some file systems refuse hard links.
        lock = file.with_name(f"{_ID_FILE}.lock")
        hold_lock(lock, f"makes {file}", wait_s=_ID_PATIENCE_S)
        try:
            if not file.is_file():
                write_text(file, uuid.uuid4().hex)
        finally:
            release_lock(lock)
    return f"{config.path().resolve()} {file.read_text(encoding='utf-8').strip()}"


def require_active(config: Config, experiment: Any) -> None:
    """Checks that an experiment was not deleted: MLflow keeps deleted ones, but accepts no runs for them.

    Raises:
        UserError: saying how to restore it, if it was deleted.
    """
    if experiment.lifecycle_stage != "active":
        uri = shlex.quote(without_secrets(tracking_uri(config)))
        raise UserError(
            f"tracking.experiment: {experiment.name!r} was deleted in MLflow. Restore it with `MLFLOW_TRACKING_URI="
            f"{uri} mlflow experiments restore --experiment-id {experiment.experiment_id}`, or name another experiment"
        )


def _experiment_id(client: Any, config: Config) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server decides where files go. Without one they belong in the work directory, not in the current directory.
        location = None if config.tracking.uri else artifacts_folder(config).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:  # another run that is starting now has created it
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    require_active(config, experiment)
    return experiment.experiment_id


def _log_params(client: Any, run_id: str, config: Config) -> None:
    from mlflow.entities import Param

    params = [Param(key, without_secrets(value)) for key, value in flatten(config.as_dict()).items() if value]
    if config.train.learning_rate_batch_size is not None:  # otherwise it equals train.learning_rate
        params.append(Param("train.peak_learning_rate", str(config.train.peak_learning_rate)))
    for start in range(0, len(params), 100):  # the maximum per request
        client.log_batch(run_id, params=params[start : start + 100])


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S%z")
