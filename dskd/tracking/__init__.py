"""MLflow: one run a training, written by rank 0. The only package that imports mlflow."""

from dskd.tracking.afterwards import log_evaluation, log_export
from dskd.tracking.client import tracking_uri
from dskd.tracking.context import git_commit
from dskd.tracking.datasets import describe_dataset
from dskd.tracking.reading import TrackedRun, read_history, read_runs
from dskd.tracking.tracker import Start, Tracker, start_tracking

__all__ = [
    "Start",
    "TrackedRun",
    "Tracker",
    "describe_dataset",
    "git_commit",
    "log_evaluation",
    "log_export",
    "read_history",
    "read_runs",
    "start_tracking",
    "tracking_uri",
]
