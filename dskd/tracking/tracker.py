"""What rank 0 tells MLflow during training.

Metrics are handed to a thread that sends them, so a slow server does not slow the step. When the server is away they
are kept and sent when it is back; training goes on and says so once.
"""

import queue
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dskd.config import Config
from dskd.console import warn
from dskd.distributed import World
from dskd.errors import UserError
from dskd.tracking.client import connect, first_line, tracking_uri, without_secrets
from dskd.tracking.context import flatten, write_context

_BATCH_METRICS = 500
_RETRY_AFTER_S = 5.0
_FLUSH_TIMEOUT_S = 60.0
EVALUATION_FOLDER = "evaluation"  # among a run's artifacts
EVALUATION_DATA_TAG = "evaluation_data"


class Tracker(Protocol):
    """What training tells about itself."""

    run_id: str | None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""

    def log_files(self, files: Sequence[Path]) -> None:
        """Files kept with the run."""

    def finish(self, status: str) -> None:
        """Sends what is left and ends the run as FINISHED, FAILED or KILLED."""


class NoTracker:
    """On every rank but the first, and when tracking is off."""

    run_id: str | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_files(self, files: Sequence[Path]) -> None:
        """Nothing."""

    def finish(self, status: str) -> None:
        """Nothing."""


def start_tracking(
    config: Config, world: World, *, tags: Mapping[str, str], resumed_run_id: str | None = None
) -> Tracker:
    """Starts a run, or goes on with the one a checkpoint names. Only rank 0 has a tracker that does anything.

    Raises:
        UserError: when the tracking server cannot be reached or refuses.
    """
    if not config.tracking.enabled or not world.is_main:
        return NoTracker()
    try:
        client = connect(config)
        run_id = resumed_run_id if resumed_run_id and _exists(client, resumed_run_id) else None
        if run_id is None:
            experiment_id = _experiment_id(client, config)
            run_id = client.create_run(experiment_id, run_name=config.run).info.run_id
            _log_params(client, run_id, config)
        else:
            client.update_run(run_id, status="RUNNING")
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
    except Exception as error:  # mlflow raises its own, sqlalchemy's and requests' errors
        raise UserError(
            f"tracking.uri: MLflow at {without_secrets(tracking_uri(config))} cannot be used "
            f"({first_line(error)}); start its server, correct the URI, or set tracking.enabled=false"
        ) from error
    tracker = MLflowTracker(client, run_id)
    with tempfile.TemporaryDirectory() as folder:
        tracker.log_files(write_context(config, Path(folder)))
    return tracker


def log_evaluation(config: Config, run_id: str, measures: Mapping[str, float], examples: Path, *, data: str) -> None:
    """Adds an evaluation to a run that has ended: its measures, what each example scored, and the digest of the data.

    A server that is away costs only these, and a warning.
    """
    try:
        client = connect(config)
        # The digest comes last: measures under a digest are whole.
        client.log_artifact(run_id, str(examples), EVALUATION_FOLDER)
        for name, value in measures.items():
            client.log_metric(run_id, f"eval/{name}", value)
        client.set_tag(run_id, EVALUATION_DATA_TAG, data)
    except Exception as error:
        warn(f"MLflow did not take the evaluation of run {run_id} ({first_line(error)})")


class MLflowTracker:
    """Sends metrics from a thread of its own."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.run_id: str | None = run_id
        self._client = client
        self._queue: queue.Queue[list[Any] | None] = queue.Queue()
        self._away = False
        self._deadline: float | None = None
        self._unsent = 0
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands the numbers to the sending thread; returns at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._queue.put([Metric(name, float(value), now, step) for name, value in metrics.items()])

    def log_files(self, files: Sequence[Path]) -> None:
        """Copies files to the run's artifacts, by the names they have."""
        try:
            for file in files:
                self._client.log_artifact(self.run_id, str(file))
        except Exception as error:  # as for metrics: the record of a run is not worth the run
            warn(f"MLflow did not take {file.name} ({first_line(error)})")

    def finish(self, status: str) -> None:
        """Waits for what is unsent, up to a minute, and ends the run."""
        self._deadline = time.monotonic() + _FLUSH_TIMEOUT_S
        self._queue.put(None)
        self._thread.join(_FLUSH_TIMEOUT_S + 30)
        if self._unsent:
            warn(f"MLflow was away to the end: {self._unsent} metrics of run {self.run_id} were not sent")
        try:
            self._client.set_terminated(self.run_id, status)
        except Exception as error:
            warn(f"MLflow did not take the end of run {self.run_id} ({first_line(error)})")

    def _send_all(self) -> None:
        ended = False
        while not ended:
            metrics = self._queue.get() or []
            ended = not metrics
            while not self._queue.empty() and len(metrics) < _BATCH_METRICS:
                more = self._queue.get()
                ended |= more is None
                metrics += more or []
            if metrics and not self._send(metrics):
                self._unsent += len(metrics)

    def _send(self, metrics: list[Any]) -> bool:
        """Tries until it works; gives up only when the run is over and its time is up."""
        while True:
            try:
                self._client.log_batch(self.run_id, metrics=metrics)
                self._away = False
                return True
            except Exception as error:
                if not self._away:
                    warn(f"MLflow is away ({first_line(error)}); training goes on, metrics are kept and sent later")
                    self._away = True
                if self._deadline is not None and time.monotonic() > self._deadline:
                    return False
                time.sleep(_RETRY_AFTER_S if self._deadline is None else 1.0)


def _experiment_id(client: Any, config: Config) -> str:
    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    # A server decides where files go; without one they belong into the work directory, not below where we stand.
    location = None if config.tracking.uri else config.path("mlartifacts").resolve().as_uri()
    return client.create_experiment(name, artifact_location=location)


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _log_params(client: Any, run_id: str, config: Config) -> None:
    from mlflow.entities import Param

    params = [Param(key, without_secrets(value)) for key, value in flatten(config.as_dict()).items() if value]
    for start in range(0, len(params), 100):  # the most that one request may have
        client.log_batch(run_id, params=params[start : start + 100])
