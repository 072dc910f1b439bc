"""Artifacts on disk: reading them with their own libraries, and changing them."""

import json
from pathlib import Path
from typing import Any

import pytest
from rank_processes import ONE_RANK

from dskd.artifacts.hashing import hash_files
from dskd.distributed.node_cache import streaming_names
from dskd.models.running.frozen import load_frozen


def open_dataset(folder: Path, cache: Path) -> Any:
    """Returns an MDS folder as mosaicml-streaming opens it; only the free name in shared memory is chosen by dskd."""
    from streaming import StreamingDataset  # the library takes seconds to import

    with streaming_names(cache, ONE_RANK):
        return StreamingDataset(remote=str(folder), local=str(cache / "mds"), batch_size=1, validate_hash="xxh64")


def update_manifest(folder: Path, **changes: object) -> None:
    """Makes the manifest of a changed artifact fit its files again, as if it had been made that way."""
    manifest = folder / "manifest.json"
    content = {**json.loads(manifest.read_text()), "files": hash_files(folder), **changes}
    manifest.write_text(json.dumps(content))


def replace_at_loading(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts another model into `folder` when an evaluation loads its first one, as another job's export would."""

    def load(*arguments: Any) -> Any:
        with (folder / "config.json").open("a") as stream:
            stream.write("\n")
        update_manifest(folder)
        return load_frozen(*arguments)

    monkeypatch.setattr("dskd.evaluation.models.load_frozen", load)
