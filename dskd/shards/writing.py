"""Writes blocks of samples as MDS shards, and joins many blocks into one dataset."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dskd.artifacts.manifest import write_json
from dskd.shards.schema import COLUMNS, HASH


@dataclass(frozen=True)
class ShardFormat:
    """The columns of shards with their encodings, their compression, and the largest size of a shard."""

    columns: Mapping[str, str]
    compression: str | None = "zstd"
    most_bytes: int | None = None  # before compression; None: all samples of a block in one shard

    def open_writer(self, folder: Path) -> Any:
        """Returns mosaicml-streaming's writer of shards into a new folder."""
        from streaming import MDSWriter  # here: the library takes seconds to import

        from dskd.shards.unpacked_writer import UnpackedWriter

        return (MDSWriter if self.compression else UnpackedWriter)(
            out=str(folder),
            columns=dict(self.columns),
            compression=self.compression,
            hashes=[HASH],
            size_limit=self.most_bytes,
        )


class BlockWriter:
    """A block that is being written, under a temporary name until it is complete."""

    def __init__(self, folder: Path, shard_format: ShardFormat) -> None:
        """Removes what an interrupted process left of the block. `folder` is where the complete block will be."""
        self._folder = folder
        self._partial = folder.with_name(f"{folder.name}.partial")
        self._format = shard_format
        self._writer: Any = None
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Adds samples, and writes the shards that they fill."""
        if self._writer is None:
            self._writer = self._format.open_writer(self._partial)
        for sample in samples:
            self._writer.write(dict(sample))

    def finish(self, name: str, value: Any) -> None:
        """Writes the last shard, the index and `value` as a JSON file `name`, and gives the block its own name."""
        self._writer.finish()
        write_json(self._partial / name, value)
        self._partial.rename(self._folder)


def write_block(
    folder: Path, samples: Iterable[Mapping[str, np.ndarray]], columns: Mapping[str, str] = COLUMNS, **options: Any
) -> None:
    """Writes samples as a folder of shards; :func:`join_blocks` joins many of these into one dataset.

    `options` are fields of :class:`ShardFormat`; by default the folder has one shard.
    """
    with ShardFormat(columns, **options).open_writer(folder) as writer:
        for sample in samples:
            writer.write(dict(sample))


def join_blocks(folder: Path, blocks: Sequence[Path]) -> int:
    """Joins the shards of `blocks`, in order, into one dataset in `folder`, and leaves the blocks unchanged.

    The result does not depend on which rank wrote which block.

    Returns:
        The number of samples.
    """
    shards: list[dict[str, Any]] = []
    for block in blocks:
        for shard in json.loads((block / "index.json").read_text())["shards"]:
            for part in ("raw_data", "zip_data"):
                if shard[part] is None:  # the packed file of shards without compression
                    continue
                old = block / shard[part]["basename"]
                _, _, ending = old.name.partition(".mds")
                shard[part]["basename"] = f"shard.{len(shards):05d}.mds{ending}"
                if old.is_file():
                    _link(old, folder / shard[part]["basename"])
            shards.append(shard)
    write_json(folder / "index.json", {"shards": shards, "version": 2})
    return sum(shard["samples"] for shard in shards)


def _link(old: Path, new: Path) -> None:
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:  # not every file system has hard links
        shutil.copyfile(old, new)
