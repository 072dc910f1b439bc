"""Writes blocks of samples as MDS shards, and joins many blocks into one dataset."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dskd.artifacts.manifest import write_json
from dskd.shards.schema import COLUMNS, COMPRESSION, HASH


def write_block(
    folder: Path, samples: Iterator[Mapping[str, np.ndarray]], columns: Mapping[str, str] = COLUMNS
) -> None:
    """Writes samples as a folder with exactly one shard; :func:`join_blocks` joins many of these into one dataset."""
    from streaming import MDSWriter  # here: the library takes seconds to import

    with MDSWriter(
        out=str(folder), columns=dict(columns), compression=COMPRESSION, hashes=[HASH], size_limit=None
    ) as writer:
        for sample in samples:
            writer.write(dict(sample))


def join_blocks(folder: Path, blocks: Sequence[Path]) -> int:
    """Joins the shards of `blocks`, in order, into one dataset in `folder`, and leaves the blocks unchanged.

    The result does not depend on which rank wrote which block.

    Returns:
        The number of samples.
    """
    shards = []
    for number, block in enumerate(blocks):
        for shard in json.loads((block / "index.json").read_text())["shards"]:
            for part, suffix in (("raw_data", ".mds"), ("zip_data", f".mds.{COMPRESSION}")):
                old = block / shard[part]["basename"]
                shard[part]["basename"] = f"shard.{number:05d}{suffix}"
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
