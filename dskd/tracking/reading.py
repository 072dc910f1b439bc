"""Reads runs, metrics and artifacts from the tracking server."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.config import Config
from dskd.errors import UserError
from dskd.tracking.client import cause_of, connect_to_read, require_answer, tracking_uri, without_secrets
from dskd.tracking.database import FILE
from dskd.tracking.runs import KIND_TAG, PARENT, find_run, require_active

_PAGE = 1000  # runs per request


@dataclass(frozen=True)
class TrackedRun:
    """A run as the tracking server knows it."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]  # the last value of each
    tags: dict[str, str]
    start_time_s: float
    experiment: str
    experiment_id: str

    @property
    def label(self) -> str:
        """Its name and the beginning of its id, since runs can have the same name."""
        return f"{self.name} ({self.run_id[:8]})"


def read_runs(config: Config, experiments: Sequence[str] = ()) -> list[TrackedRun]:
    """Returns the runs of `experiments` or, if none are named, of the config's experiment, newest first.

    Raises:
        UserError: if the tracking server cannot be read, or lacks one of the named experiments; the config's own
            experiment need not exist yet.
    """
    if not _is_tracked(config) and not experiments:
        return []
    with _reading(config) as client:
        runs = []
        for name in dict.fromkeys(experiments or (config.tracking.experiment,)):
            experiment = client.get_experiment_by_name(name)
            if experiment is not None:
                require_active(config, experiment)
                runs += [
                    _tracked(run, name)
                    for run in _all_pages(client, experiment.experiment_id)
                    if run.data.tags.get(KIND_TAG) != PARENT  # a parent only groups runs; it was not trained
                ]
            elif experiments:
                names = sorted(other.name for other in client.search_experiments())
                raise UserError(
                    f"experiment {name!r}: MLflow at {without_secrets(tracking_uri(config))} has no such experiment; "
                    f"it has {', '.join(names) or 'none'}"
                )
        return sorted(runs, key=lambda run: -run.start_time_s)


def read_run(config: Config, run_id: str) -> TrackedRun | None:
    """Returns the run with this id, in any experiment; None if there is none or it was deleted."""
    with _reading(config) as client:
        run = find_run(client, run_id)
        return None if run is None else _tracked(run, client.get_experiment(run.info.experiment_id).name)


def read_history(config: Config, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Returns [(step, value)] of one metric of a run, in the order of steps."""
    return read_histories(config, run_id, [metric])[metric]


def read_histories(config: Config, run_id: str, metrics: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Returns {metric: [(step, value)]} of a run, in the order of steps; if a step was logged twice, the later value
    counts.
    """
    with _reading(config) as client:
        histories = {}
        for metric in metrics:
            points = sorted(client.get_metric_history(run_id, metric), key=lambda point: point.timestamp)
            histories[metric] = sorted({point.step: point.value for point in points}.items())
        return histories


def read_artifact(config: Config, run_id: str, path: str) -> bytes | None:
    """Returns the content of a run's artifact file; None if it has no such file."""
    with _reading(config) as client, tempfile.TemporaryDirectory() as folder:
        parent = path.rpartition("/")[0]
        if path not in {file.path for file in client.list_artifacts(run_id, parent or None)}:
            return None
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


def _is_tracked(config: Config) -> bool:
    """Returns False if nothing was tracked in this work directory yet: MLflow would create a database just to read."""
    return config.tracking.uri is not None or config.path(FILE).exists()


@contextmanager
def _reading(config: Config) -> Iterator[Any]:
    """Yields a client; turns errors in the block into a UserError that says what to do."""
    if not _is_tracked(config):
        raise UserError(f"{config.path('mlflow.db')}: no run was tracked here yet; train first, or set tracking.uri")
    uri = tracking_uri(config)
    try:
        require_answer(uri)
        yield connect_to_read(config)
    except UserError:
        raise
    except Exception as error:  # mlflow raises its own, sqlalchemy's and requests' errors
        raise UserError(
            f"tracking.uri: MLflow at {without_secrets(uri)} cannot be read ({cause_of(error)}); start its server, or "
            "set tracking.uri to its address, with http:// or https://, host and port"
        ) from error


def _all_pages(client: Any, experiment_id: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _tracked(run: Any, experiment: str) -> TrackedRun:
    return TrackedRun(
        run.info.run_id,
        run.info.run_name,
        run.info.status,
        dict(run.data.params),
        dict(run.data.metrics),
        dict(run.data.tags),
        run.info.start_time / 1000,
        experiment,
        run.info.experiment_id,
    )
