"""The connection to MLflow: the server's address, and the errors of a server that cannot be used."""

import contextlib
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

from dskd.config import Config
from dskd.errors import OutageError, UserError, first_line
from dskd.tracking.database import (
    artifacts_folder,
    correct_addresses,
    database_file,
    database_uri,
    make_database,
    readable_file,
)

# Defaults for variables that the environment does not set: no telemetry; notice an unreachable server within seconds.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # otherwise printed at the end of every run, amid our output
    "GIT_PYTHON_REFRESH": "quiet",
}
_ANSWERS_WITHIN_S = 5
# Errors that a server would return again. Anything else may pass: no connection, a time-out, an expired login.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")


def tracking_uri(config: Config) -> str:
    """Returns the configured URI, or that of the database in the work directory."""
    return config.tracking.uri or database_uri(database_file(config))


def load_mlflow() -> None:
    """Imports the modules of mlflow that are used later, also in threads.

    A process may be forked while such a thread runs, and a child that is forked in the middle of an import waits
    forever when it imports something itself.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow.data.schema
    import mlflow.entities
    import mlflow.system_metrics.system_metrics_monitor  # noqa: F401


def connect(config: Config) -> Any:
    """Returns MLflow's client for the config's tracking URI. Raises errors of mlflow, sqlalchemy or requests."""
    load_mlflow()
    from mlflow import MlflowClient

    if config.tracking.uri is None:
        file = database_file(config)
        make_database(file)
        correct_addresses(file, artifacts_folder(config))
    elif config.tracking.uri.startswith("sqlite"):
        from sqlalchemy.engine import make_url

        if name := make_url(config.tracking.uri).database:
            make_database(Path(name))
    return MlflowClient(tracking_uri(config))


def connect_to_read(config: Config) -> Any:
    """Returns a client like :func:`connect`, but writes nothing in a work directory that this process may only read."""
    if config.tracking.uri is not None:
        return connect(config)
    file = database_file(config)
    readable = readable_file(file)
    if readable == file:
        return connect(config)
    load_mlflow()
    from mlflow import MlflowClient

    correct_addresses(readable, artifacts_folder(config))
    return MlflowClient(database_uri(readable))


@functools.cache  # one answer is enough
def require_answer(uri: str) -> None:
    """Checks within seconds that an HTTP server answers; MLflow's own client would retry for a minute.

    Raises:
        OSError: if it does not answer. Any answer counts here, even a refusal.
    """
    if re.match(r"https?://", uri):
        import requests

        with contextlib.suppress(requests.exceptions.SSLError):  # MLflow may be configured to trust the server anyway
            requests.get(f"{uri.rstrip('/')}/health", timeout=_ANSWERS_WITHIN_S)


def is_refusal(error: BaseException) -> bool:
    """Returns True if a retry would fail too: MLflow understood the message and rejects it, or the fault is ours."""
    if isinstance(error, UserError | ValueError | TypeError | LookupError | AttributeError | ImportError):
        # The error of requests for an answer that is not JSON is both a ValueError and an OSError.
        return not isinstance(error, OSError | OutageError)
    return getattr(error, "error_code", None) in _REFUSALS


def without_secrets(text: str) -> str:
    """Removes user names and passwords from URLs in `text`, for records that others read."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def cause_of(error: BaseException) -> str:
    """Returns why a server cannot be reached: the operating system's reason or, if there is none, the first line."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, TimeoutError):
            return "no answer in time"
        if isinstance(at, OSError) and at.strerror:
            return at.strerror
        at = at.__cause__ or at.__context__
    return first_line_without_secrets(error)


def first_line_without_secrets(error: BaseException) -> str:
    """Returns the first line of an error's message, without secrets."""
    return without_secrets(first_line(error))[:300]
