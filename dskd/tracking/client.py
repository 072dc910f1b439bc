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
from dskd.lock import hold_lock, release_lock

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
_DATABASE_PATIENCE_S = 300.0
# What a server answers that will answer so again. Anything else can pass: no connection, a time-out, a lapsed login.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")


def tracking_uri(config: Config) -> str:
    """The configured URI, or sqlite in the work directory."""
    return config.tracking.uri or f"sqlite:///{config.path('mlflow.db').resolve()}"


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
    """MLflow's client for the config's tracking URI. What it raises is mlflow's, sqlalchemy's or requests'."""
    load_mlflow()
    from mlflow import MlflowClient

    uri = tracking_uri(config)
    if sqlite := re.match(r"sqlite[^:]*:///([^?]+)", uri):
        _make_database(Path(sqlite[1]))
    return MlflowClient(uri)


def _make_database(file: Path) -> None:
    """Makes an sqlite database that is not there yet, so that it is there whole or not at all, whoever else begins.

    MLflow makes its tables in some fifty migrations, without a lock: two runs that start at once on a new work
    directory would spoil them for each other, and one that is killed for itself.
    """
    from mlflow import MlflowClient

    if file.exists() or not file.parent.is_dir():
        return
    lock = file.with_name(f".{file.name}.lock")
    hold_lock(lock, f"makes {file}", wait_s=_DATABASE_PATIENCE_S)
    try:
        if not file.exists():
            new = file.with_name(f".{file.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{new}")
            new.rename(file)
    finally:
        release_lock(lock)


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
