"""What a run reads, for MLflow's dataset API: the shards and the sense dictionary, as their manifests describe them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskd.artifacts.manifest import Manifest
from dskd.tracking.client import without_secrets

_DIGEST_LENGTH = 36  # MLflow takes no longer one


def describe_dataset(
    name: str, context: str, source: str, manifest: Manifest, columns: Mapping[str, str]
) -> dict[str, Any]:
    """A dataset as the message of kind `datasets` has it.

    Args:
        name: what MLflow calls it.
        context: what the run uses it for, as MLflow shows it: `training`, `validation`.
        source: where it lies.
        manifest: its own; the digest is the manifest's, shortened, and the profile its facts.
        columns: {column: type of its numbers}, all of unknown length.
    """
    if "://" not in source:
        source = str(Path(source).resolve())
    return {
        "name": name,
        "context": context,
        "source": without_secrets(source),
        "digest": manifest.digest[:_DIGEST_LENGTH],
        "profile": manifest.facts,
        "columns": dict(columns),
    }


def log_datasets(client: Any, run_id: str, datasets: list[dict[str, Any]]) -> None:
    """Makes them inputs of the run; those that it has already stay as they are."""
    import numpy as np
    from mlflow.data.schema import TensorDatasetSchema
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.types import Schema, TensorSpec

    inputs = []
    for dataset in datasets:
        scheme, separator, _ = dataset["source"].partition("://")
        columns = [TensorSpec(np.dtype(dtype), (-1,), name) for name, dtype in dataset["columns"].items()]
        described = Dataset(
            dataset["name"],
            dataset["digest"],
            scheme if separator else "local",  # what MLflow's own sources of these kinds are called
            json.dumps({"uri": dataset["source"]}),
            json.dumps(TensorDatasetSchema(Schema(columns)).to_dict()),
            json.dumps(dataset["profile"]),
        )
        inputs.append(DatasetInput(described, [InputTag("mlflow.data.context", dataset["context"])]))
    client.log_inputs(run_id, inputs)
