"""The connection to MLflow: where the server is, and what it says when it cannot be used."""

import logging
import os
import re
from typing import Any

from dskd.config import Config

# Defaults for what the environment leaves open: no telemetry, and an unreachable server is noticed in seconds.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(config: Config) -> str:
    """The configured URI, or sqlite in the work directory."""
    return config.tracking.uri or f"sqlite:///{config.path('mlflow.db').resolve()}"


def connect(config: Config) -> Any:
    """MLflow's client for the config's tracking URI. What it raises is mlflow's, sqlalchemy's or requests'."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(config))


def without_secrets(text: str) -> str:
    """User names and passwords of URLs do not belong into records that others read."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def first_line(error: BaseException) -> str:
    """What an error says first, without secrets."""
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
