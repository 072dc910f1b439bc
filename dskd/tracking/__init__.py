"""MLflow: one run a training, written by rank 0. The only package that imports mlflow."""

from dskd.tracking.client import tracking_uri, without_secrets
from dskd.tracking.context import git_commit
from dskd.tracking.reading import TrackedRun, read_artifact, read_histories, read_history, read_run, read_runs
from dskd.tracking.tracker import EVALUATION_DATA_TAG, EVALUATION_FOLDER, Tracker, log_evaluation, start_tracking

__all__ = [
    "EVALUATION_DATA_TAG",
    "EVALUATION_FOLDER",
    "TrackedRun",
    "Tracker",
    "git_commit",
    "log_evaluation",
    "read_artifact",
    "read_histories",
    "read_history",
    "read_run",
    "read_runs",
    "start_tracking",
    "tracking_uri",
    "without_secrets",
]
