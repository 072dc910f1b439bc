"""Opens shards as a dataset, from the work directory or a remote copy of it."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd.artifacts import kinds
from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.mds import INDEX, read_index
from dskd.config import Config
from dskd.distributed.collectives import on_main
from dskd.distributed.node_cache import streaming_names
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError, reason_of
from dskd.shards.schema import HASH, load_manifest

if TYPE_CHECKING:
    from dskd.shards.dataset import ShardDataset

_REMOTE_TIMEOUT_S = 60.0


def open_shards(config: Config, split: str, cache: Path, world: World, **options: Any) -> "ShardDataset":
    """Opens the dataset of a split. Nothing is written to the artifact itself.

    Shards are fetched or unpacked into `cache`, except those of the artifact if they are not packed: these are read
    where they are, unless `train.shard_cache` names a folder to copy them to.

    A remote copy must have the same index as the artifact. The index has the hash of each shard, and mosaicml-streaming
    checks these; or it has the hash of each sample, and :class:`ShardDataset` checks these. Every rank must call this.

    Raises:
        UserError: when the remote copy holds other shards, or cannot be read.
    """
    from dskd.shards.dataset import ShardDataset

    if config.train.shard_remote is not None:
        # Check first: if the library meets the error, all ranks but one wait forever for files that never come.
        on_main(lambda: require_remote(config, split))
    in_place = _is_read_in_place(config, split)
    # Shards with states are smaller, and yet their samples come in the same order as without.
    without_states = load_manifest(config, split).facts.get("without_states", {})
    with streaming_names(cache, world):
        dataset = ShardDataset(
            remote=None if in_place else location_of(config, split),
            local=location_of(config, split) if in_place else str(cache / split),
            validate_hash=HASH,
            order_by=without_states.get("samples_per_shard"),
            keep_zip=False,
            **options,
        )
    if config.train.shard_remote is not None:
        _require_same_index(config, split, cache / split / INDEX)
    return dataset


def _is_read_in_place(config: Config, split: str) -> bool:
    if config.train.shard_remote is not None or config.train.shard_cache is not None:
        return False
    return all(shard["zip_data"] is None for shard in read_index(Path(location_of(config, split)) / INDEX))


def location_of(config: Config, split: str) -> str:
    """Returns the folder or address that a split's shards are read from."""
    if config.train.shard_remote is None:
        return str(config.path(kinds.SHARDS.folder, split).resolve())
    return f"{config.train.shard_remote.rstrip('/')}/{split}"


def require_remote(config: Config, split: str) -> None:
    """Checks that this node can read the remote copy of a split, and that it holds the same shards as the artifact.

    Raises:
        UserError: when it has no index, or the index of other shards, or may not be read.
        OutageError: when it cannot be reached.
    """
    from streaming.base.storage.download import CloudDownloader

    remote = f"{location_of(config, split)}/{INDEX}"
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / INDEX
        try:
            CloudDownloader.get(remote).direct_download(remote, str(index), timeout=_REMOTE_TIMEOUT_S)
        except Exception as error:  # every store has its own kinds of errors
            reason = reason_of(error)
            raise (UserError if is_lasting(error) else OutageError)(
                f"train.shard_remote: {remote} cannot be read ({reason}); copy {config.path(kinds.SHARDS.folder)} "
                "there, correct the address, or check the access (credentials, network)"
            ) from error
        _require_same_index(config, split, index)


def is_lasting(error: Exception) -> bool:
    """Returns True if a retry on the remote copy would fail with the same error.

    That is so if the object does not exist, is a different one, or may not be read. Other failures (network, server)
    may pass.
    """
    if isinstance(error, (FileNotFoundError, PermissionError, ValueError, ImportError)):
        return True
    # Amazon's library has one class for all errors of a server. It may not be installed, so look at attributes.
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return code in ("403", "404", "AccessDenied", "NoSuchKey", "NoSuchBucket") or (
        type(error).__name__ == "NoCredentialsError"
    )


def _require_same_index(config: Config, split: str, index: Path) -> None:
    expected = load_manifest(config, split).files[INDEX]["sha256"]
    digest = sha256_of_file(index)
    if digest != expected:
        raise UserError(
            f"{location_of(config, split)}: its {INDEX} is not that of {config.path(kinds.SHARDS.folder, split)} "
            f"(sha256 {digest[:12]}…, expected {expected[:12]}…), so it has other shards; copy "
            f"{config.path(kinds.SHARDS.folder)} there again, or correct train.shard_remote",
            known_to_all_ranks=True,
        )
