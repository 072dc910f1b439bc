"""Shards as a dataset, from the work directory or a remote copy of it."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd.artifacts import kinds
from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.mds import INDEX
from dskd.config import Config
from dskd.distributed.collectives import on_main
from dskd.distributed.node_cache import streaming_names
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError
from dskd.shards.schema import HASH, load_manifest

if TYPE_CHECKING:
    from dskd.shards.dataset import ShardDataset

_REMOTE_TIMEOUT_S = 60.0


def open_shards(config: Config, split: str, cache: Path, world: World, **options: Any) -> "ShardDataset":
    """The dataset of a split; shards are unpacked into `cache`, and the artifact itself is never written to.

    A remote copy is trusted as far as its index is the artifact's own, for that has the hash of each shard, which
    mosaicml-streaming compares. Every rank must call it.

    Raises:
        UserError: when the remote copy is of other shards, or cannot be read.
    """
    from dskd.shards.dataset import ShardDataset

    if config.train.shard_remote is not None:
        on_main(
            lambda: require_remote(config, split)
        )  # in streaming all ranks but one would wait for what does not come
    with streaming_names(cache, world):
        dataset = ShardDataset(
            remote=place(config, split),
            local=str(cache / split),
            validate_hash=HASH,
            keep_zip=False,
            **options,
        )
    if config.train.shard_remote is not None:
        _require_same_index(config, split, cache / split / INDEX)
    return dataset


def place(config: Config, split: str) -> str:
    """Where a split's shards are read from."""
    if config.train.shard_remote is None:
        return str(config.path(kinds.SHARDS.folder, split).resolve())
    return f"{config.train.shard_remote.rstrip('/')}/{split}"


def require_remote(config: Config, split: str) -> None:
    """Looks whether the remote copy of a split can be read from this node, and is a copy of these very shards.

    Raises:
        UserError: when it has no index, or that of other shards; an OutageError when it cannot be reached.
    """
    from streaming.base.storage.download import CloudDownloader

    remote = f"{place(config, split)}/{INDEX}"
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / INDEX
        try:
            CloudDownloader.get(remote).direct_download(remote, str(index), timeout=_REMOTE_TIMEOUT_S)
        except Exception as error:  # of each store its own kind
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise (UserError if is_lasting(error) else OutageError)(
                f"train.shard_remote: {remote} cannot be read ({reason}); copy {config.path(kinds.SHARDS.folder)} "
                "there, correct the address, or see to the access (credentials, network)"
            ) from error
        _require_same_index(config, split, index)


def is_lasting(error: Exception) -> bool:
    """Whether what went wrong with a remote copy would go wrong again: what is asked for is not there, is another, or
    may not be read. Anything else (network, server) may mend itself.
    """
    if isinstance(error, (FileNotFoundError, PermissionError, ValueError, ImportError)):
        return True
    # Amazon's library has one class for all that a server answers, and may not be installed.
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return code in ("403", "404", "AccessDenied", "NoSuchKey", "NoSuchBucket") or (
        type(error).__name__ == "NoCredentialsError"
    )


def _require_same_index(config: Config, split: str, index: Path) -> None:
    expected = load_manifest(config, split).files[INDEX]["sha256"]
    found = sha256_of_file(index)
    if found != expected:
        raise UserError(
            f"{place(config, split)}: its {INDEX} is not that of {config.path(kinds.SHARDS.folder, split)} (sha256 "
            f"{found[:12]}…, expected {expected[:12]}…): it has other shards; copy {config.path(kinds.SHARDS.folder)} "
            "there again, or correct train.shard_remote",
            known_to_all_ranks=True,
        )
