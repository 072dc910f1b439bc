"""The connection to MLflow: where the server is, and what it says when it cannot be used."""

import contextlib
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

from dskd.config import Config
from dskd.errors import OutageError, UserError
from dskd.tracking.database import (
    artifacts_folder,
    correct_addresses,
    database_file,
    database_uri,
    make_database,
    readable_file,
)

# Defaults for what the environment leaves open: no telemetry, and an unreachable server is noticed in seconds.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with every end of a run, and in among what we print
    "GIT_PYTHON_REFRESH": "quiet",
}
_ANSWERS_WITHIN_S = 5
# What a server answers that will answer so again. Anything else can pass: no connection, a time-out, a lapsed login.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")


def tracking_uri(config: Config) -> str:
    """Returns the configured URI, or that of the database in the work directory."""
    return config.tracking.uri or database_uri(database_file(config))


def load_mlflow() -> None:
    """Imports what is used of mlflow later on, in threads too: processes are forked beside those, and a child that is
    forked in the middle of an import waits for ever for what it imports itself.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow.data.schema
    import mlflow.entities
    import mlflow.system_metrics.system_metrics_monitor  # noqa: F401


def connect(config: Config) -> Any:
    """Returns MLflow's client for the config's tracking URI. What it raises is mlflow's, sqlalchemy's or requests'."""
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
    """Like :func:`connect`, and writes nothing in a work directory that this process may only read."""
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


@functools.cache  # of a server that answered once
def require_answer(uri: str) -> None:
    """Notices within seconds that an HTTP server is away; MLflow's own client tries again for a minute.

    Raises:
        OSError: when it does not answer. Any answer will do here, a refusal too.
    """
    if re.match(r"https?://", uri):
        import requests

        with contextlib.suppress(requests.exceptions.SSLError):  # MLflow may be told to trust it all the same
            requests.get(f"{uri.rstrip('/')}/health", timeout=_ANSWERS_WITHIN_S)


def is_refusal(error: BaseException) -> bool:
    """True when the same would be answered again: MLflow has understood and will not take it, or the fault is here."""
    if isinstance(error, UserError | ValueError | TypeError | LookupError | AttributeError | ImportError):
        # requests' error of an answer that is no JSON is both
        return not isinstance(error, OSError | OutageError)
    return getattr(error, "error_code", None) in _REFUSALS


def without_secrets(text: str) -> str:
    """User names and passwords of URLs do not belong into records that others read."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def cause_of(error: BaseException) -> str:
    """Why a server cannot be reached, as the operating system says it; else what the error says first."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, TimeoutError):
            return "no answer in time"
        if isinstance(at, OSError) and at.strerror:
            return at.strerror
        at = at.__cause__ or at.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """What an error says first, without secrets."""
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
