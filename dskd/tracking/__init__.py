"""MLflow: one run a training, written by rank 0. The only package that imports mlflow."""

from dskd.tracking.client import tracking_uri
from dskd.tracking.context import git_commit
from dskd.tracking.reading import TrackedRun, read_history, read_runs
from dskd.tracking.tracker import Tracker, log_final_metrics, start_tracking

__all__ = [
    "TrackedRun",
    "Tracker",
    "git_commit",
    "log_final_metrics",
    "read_history",
    "read_runs",
    "start_tracking",
    "tracking_uri",
]
