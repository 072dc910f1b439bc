"""A run's inputs for MLflow's dataset API: the shards and the sense dictionary, as their manifests describe them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskd.artifacts.manifest import Manifest
from dskd.tracking.client import without_secrets

_DIGEST_LENGTH = 36  # the longest that MLflow accepts


def describe_dataset(
    name: str, context: str, source: str, manifest: Manifest, columns: Mapping[str, str]
) -> dict[str, Any]:
    """Describes a dataset in the format of the messages of kind `datasets`.

    Args:
        name: the dataset's name in MLflow.
        context: the run's use of it, as MLflow shows it: `training`, `validation`.
        source: its path or URL.
        manifest: its manifest, which gives the digest (shortened) and the profile (its facts).
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
    """Adds `datasets` to the inputs of the run; inputs that it already has stay unchanged."""
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
            scheme if separator else "local",  # the names of MLflow's own source types
            json.dumps({"uri": dataset["source"]}),
            json.dumps(TensorDatasetSchema(Schema(columns)).to_dict()),
            json.dumps(dataset["profile"]),
        )
        inputs.append(DatasetInput(described, [InputTag("mlflow.data.context", dataset["context"])]))
    client.log_inputs(run_id, inputs)
