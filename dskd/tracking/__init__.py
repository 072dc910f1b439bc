"""Tracking with MLflow: one MLflow run per training, written by rank 0. No other package imports mlflow.

tracker           tracks a training, from its start to its end
runs              creates the MLflow run of a training, resumes an earlier one, and ends those of dead processes
context           records a run's parameters, environment, commit and manifests
datasets          describes a run's inputs for MLflow's dataset API
outbox            keeps messages to MLflow in order until they have arrived
delivery          sends the outbox's messages, by one thread of one process at a time
system_metrics    reads the use of processors, memory, disks, network and GPUs
afterwards        sends what follows a training: its model and its measures
unlogged          notes which artifacts' results MLflow does not have yet
registered_model  uploads the exported student as an MLflow model
reading           reads runs, metrics and artifacts from MLflow
client            connects to the server, and recognises its errors
database          the sqlite database in a work directory
"""

from dskd.tracking.afterwards import (
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
from dskd.tracking.unlogged import forget_unlogged, note_unlogged, read_unlogged
