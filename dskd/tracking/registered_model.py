"""The exported student as an MLflow model of its run, for `tracking.log_model`."""

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.hashing import MANIFEST_NAME
from dskd.artifacts.manifest import read_manifest
from dskd.config import Config
from dskd.tracking.client import tracking_uri

NAME = "student"
_REQUIREMENTS = ("transformers", "torch", "accelerate", "safetensors", "tokenizers")


def log_model(client: Any, config: Config, run_id: str, folder: Path) -> None:
    """Uploads an exported folder without loading the model; does nothing if the run already has exactly this model."""
    import mlflow

    digest = read_manifest(folder, kinds.EXPORT.name).digest
    run = client.get_run(run_id)
    if run.data.tags.get("model") == digest:
        return
    # Silence a warning that the folder is not a model of the Hub. (Given an absolute path, it does not search the Hub.)
    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)
    # The fluent interface has one server per process; no other package uses it.
    mlflow.set_tracking_uri(tracking_uri(config))
    mlflow.transformers.log_model(
        str(folder.resolve()),
        name=NAME,
        run_id=run_id,  # not an active run, whose end would mark this one as FINISHED
        task="text-generation",
        # Passed so that MLflow does not determine them by running the model in a separate environment.
        pip_requirements=[f"{name}=={version}" for name in _REQUIREMENTS if (version := _version(name))],
        tags={"export": digest},
    )
    client.set_tag(run_id, "model", digest)


def size_bytes(folder: Path) -> int:
    """Returns the size of the model to upload."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != MANIFEST_NAME)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
