"""Runs as the tracking server knows them."""

from dataclasses import dataclass

from dskd.config import Config
from dskd.errors import UserError
from dskd.tracking.client import connect, first_line, tracking_uri, without_secrets
from dskd.tracking.runs import KIND_TAG, PARENT


@dataclass(frozen=True)
class TrackedRun:
    """A run as the tracking server knows it."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    start_time_s: float


def read_runs(config: Config) -> list[TrackedRun]:
    """The runs of the config's experiment, newest first.

    Raises:
        UserError: when there is no tracking server, or no such experiment.
    """
    try:
        client = connect(config)
        experiment = client.get_experiment_by_name(config.tracking.experiment)
        runs = [] if experiment is None else client.search_runs([experiment.experiment_id], max_results=1000)
    except Exception as error:
        raise UserError(
            f"tracking.uri: MLflow at {without_secrets(tracking_uri(config))} cannot be read ({first_line(error)})"
        ) from error
    return [
        TrackedRun(
            run.info.run_id,
            run.info.run_name,
            run.info.status,
            dict(run.data.params),
            dict(run.data.metrics),
            dict(run.data.tags),
            run.info.start_time / 1000,
        )
        for run in runs
        if run.data.tags.get(KIND_TAG) != PARENT  # it holds others together, and was trained by nobody
    ]


def read_history(config: Config, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, by step."""
    try:
        points = {point.step: point.value for point in connect(config).get_metric_history(run_id, metric)}
    except Exception as error:
        raise UserError(
            f"tracking.uri: MLflow at {without_secrets(tracking_uri(config))} cannot be read ({first_line(error)})"
        ) from error
    return sorted(points.items())
