"""Writes blocks of samples as MDS shards, and joins many blocks into one dataset."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dskd.artifacts.files import flush_folder
from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.manifest import digest_of_content, json_text, write_json
from dskd.artifacts.mds import INDEX
from dskd.shards.schema import COLUMNS, HASH, TEACHER_STATES, TRUNK_STATES

_NOTES_FILE = "block.json"  # in each block, until the blocks are joined


@dataclass(frozen=True)
class ShardFormat:
    """The columns of shards with their encodings, their compression, and the largest size of a shard."""

    columns: Mapping[str, str]
    compression: str | None = "zstd"
    most_bytes: int | None = None  # before compression; None: all samples of a block in one shard

    @property
    def without_states(self) -> "ShardFormat | None":
        """The format of the same samples without the teacher's states; None if they have none."""
        columns = {name: kind for name, kind in self.columns.items() if name not in (TEACHER_STATES, TRUNK_STATES)}
        return None if len(columns) == len(self.columns) else ShardFormat(columns)

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
    """A block that is being written, under a temporary name until it is complete.

    If samples have states, it also writes them without, only to know the hashes of those shards.
    """

    def __init__(self, folder: Path, shard_format: ShardFormat) -> None:
        """Removes what an interrupted process left of the block. `folder` is where the complete block will be."""
        self._folder = folder
        self._partial = folder.with_name(f"{folder.name}.partial")
        self._plain = folder.with_name(f"{folder.name}.plain.partial")
        self._format = shard_format
        self._writers: list[Any] = []
        for old in (folder, self._partial, self._plain):
            shutil.rmtree(old, ignore_errors=True)

    def add(self, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Adds samples, and writes the shards that they fill."""
        if not self._writers:
            self._writers.append(self._format.open_writer(self._partial))
            if (plain := self._format.without_states) is not None:
                self._writers.append(plain.open_writer(self._plain))
        for sample in samples:
            for writer in self._writers:
                writer.write({name: sample[name] for name in writer.column_names})

    def finish(self, facts: Any) -> None:
        """Writes the last shard, the index, and the notes with `facts`; then gives the block its own name."""
        for writer in self._writers:
            writer.finish()
        notes = {"facts": facts, "files": _hashes(self._partial, getattr(self._writers[0], "sha256", {}))}
        if len(self._writers) > 1:
            shards = json.loads((self._plain / INDEX).read_text())["shards"]
            notes["without_states"] = {"shards": shards, "files": _hashes(self._plain, {})}
            shutil.rmtree(self._plain)
        write_json(self._partial / _NOTES_FILE, notes)
        flush_folder(self._partial)  # here, and not only when all blocks are published, which can be terabytes
        self._partial.rename(self._folder)


def is_block(folder: Path) -> bool:
    """Returns True if a complete block is in `folder`."""
    return (folder / _NOTES_FILE).is_file()


@dataclass(frozen=True)
class JoinedBlocks:
    """The dataset that blocks are joined to, as the notes of the blocks describe it."""

    facts: list[Any]  # of each block
    hashes: dict[str, str]  # sha256 of each shard file, by its name in the dataset
    digest_without_states: str | None  # that an artifact of the same samples without states has; None without states

    @classmethod
    def of(cls, blocks: Sequence[Path]) -> "JoinedBlocks":
        """Reads the notes of `blocks`, in order; reads no shard."""
        notes = [json.loads((block / _NOTES_FILE).read_text(encoding="utf-8")) for block in blocks]
        hashes = _hashes_by_new_name([_shards(block) for block in blocks], [note["files"] for note in notes])
        digest = None
        if all("without_states" in note for note in notes):
            plain = [note["without_states"] for note in notes]
            of_plain = _hashes_by_new_name([note["shards"] for note in plain], [note["files"] for note in plain])
            index = json_text(_index([note["shards"] for note in plain])[0])
            of_plain[INDEX] = hashlib.sha256(index.encode()).hexdigest()
            digest = digest_of_content("shards", of_plain)
        return cls([note["facts"] for note in notes], hashes, digest)


def _hashes(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Returns {name: sha256} of the shard files in a block's folder; reads those that are not `known`."""
    names = [path.name for path in folder.iterdir() if path.name != INDEX]
    return {name: known.get(name) or sha256_of_file(folder / name) for name in sorted(names)}


def _hashes_by_new_name(shards: Sequence[list[dict[str, Any]]], hashes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    names = _index(shards)[1]
    return {new: hashes[block][old] for block, old, new in names if old in hashes[block]}


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
    """Joins the shards of `blocks`, in order, into one dataset in `folder`.

    The result does not depend on which rank wrote which block. No shard is copied: it gets a second name or, on a file
    system without hard links, only another one. A call after one that was interrupted completes its work.

    Returns:
        The number of samples.
    """
    index, names = _index([_shards(block) for block in blocks])
    for block, old, new in names:
        if (blocks[block] / old).is_file():
            _link(blocks[block] / old, folder / new)
    write_json(folder / INDEX, index)
    return sum(shard["samples"] for shard in index["shards"])


def _shards(block: Path) -> list[dict[str, Any]]:
    return json.loads((block / INDEX).read_text())["shards"]


def _index(blocks: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[dict[str, Any], list[tuple[int, str, str]]]:
    """Returns the index of the joined shards of blocks, and (number of the block, old name, new name) of each file."""
    shards: list[dict[str, Any]] = []
    names = []
    for number, block in enumerate(blocks):
        for shard in block:
            joined = dict(shard)
            for part in ("raw_data", "zip_data"):
                if shard[part] is None:  # the packed file of shards without compression
                    continue
                old = shard[part]["basename"]
                new = f"shard.{len(shards):05d}.mds{old.partition('.mds')[2]}"
                joined[part] = shard[part] | {"basename": new}
                names.append((number, old, new))
            shards.append(joined)
    return {"shards": shards, "version": 2}, names


def _link(old: Path, new: Path) -> None:
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:  # not every file system has hard links
        shutil.move(old, new)
