"""Tracking with MLflow: one MLflow run per training, written by rank 0. No other package imports mlflow."""

from dskd.tracking.afterwards import (
    EVALUATION_FOLDER,
    data_tag,
    log_export,
    log_results,
)
from dskd.tracking.client import tracking_uri, without_secrets
from dskd.tracking.context import git_commit
from dskd.tracking.datasets import describe_dataset
from dskd.tracking.reading import TrackedRun, read_artifact, read_histories, read_history, read_run, read_runs
from dskd.tracking.runs import KIND_TAG, PARENT
from dskd.tracking.tracker import Start, Tracker, start_tracking
