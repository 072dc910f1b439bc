"""A link to MLflow's own comparison of the same runs."""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dskd.config import Config
from dskd.tracking import TrackedRun, tracking_uri, without_secrets

_LOCAL = "http://127.0.0.1:5000"  # the address of `mlflow ui`


@dataclass(frozen=True)
class MLflowLink:
    """An address, and the command that starts a server for it; None if the address is that of a running server."""

    address: str
    command: str | None

    def __str__(self) -> str:
        if self.command is None:
            return f"MLflow: {self.address}"
        return f"MLflow: run `{self.command}` and open {self.address}"


def mlflow_link(config: Config, runs: Sequence[TrackedRun]) -> MLflowLink:
    """Returns the link to MLflow's page that compares these runs."""
    uri = tracking_uri(config)
    ids, experiments = [run.run_id for run in runs], list(dict.fromkeys(run.experiment_id for run in runs))
    page = f"/#/compare-runs?runs={_as_parameter(ids)}&experiments={_as_parameter(experiments)}"
    if re.match(r"https?://", uri):
        without_password = re.sub(r"://[^/@]*@", "://", uri)  # the browser asks for it
        return MLflowLink(without_password.rstrip("/") + page, None)
    program = Path(sys.executable).with_name("mlflow")  # of this environment, whose programs may not be on the PATH
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return MLflowLink(_LOCAL + page, shlex.join([str(shown), "ui", "--backend-store-uri", without_secrets(uri)]))


def _as_parameter(values: Sequence[str]) -> str:
    return quote(json.dumps(values, separators=(",", ":")), safe="")
