"""`dskd inspect shards`: compares all shards with the hashes that were recorded when they were written."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dskd.artifacts import kinds
from dskd.artifacts.hashing import hash_files
from dskd.artifacts.manifest import NOT_AS_RECORDED, Manifest, read_manifest
from dskd.artifacts.mds import HASH_OF_SAMPLES, INDEX, files_of, read_index
from dskd.config import Config
from dskd.console import gigabytes, progress_bar
from dskd.corpus.build import SPLITS
from dskd.errors import UserError

_PIECE = 2**24  # bytes read at a time
_MOST_LINES = 20  # of changed samples in a message


@dataclass(frozen=True)
class CheckedShards:
    """A split whose files are all as they were written."""

    split: str
    num_samples: int
    num_files: int
    num_bytes: int
    by_sample: int  # files of which each sample was compared, because the index has its hash


def inspect_shards(config: Config) -> list[CheckedShards]:
    """Compares the files of all splits with their manifests, and samples that have their own hash with the index.

    Reads all files; only the content of `train.shard_remote` is not looked at.

    Raises:
        UserError: if shards are missing or changed; it names the files and samples.
    """
    folders = {split: config.path(kinds.SHARDS.folder, split) for split in SPLITS}
    manifests = {split: read_manifest(folder, kinds.SHARDS.name) for split, folder in folders.items()}
    findings: list[str] = []
    checked = []
    total = sum(entry["size_bytes"] for manifest in manifests.values() for entry in manifest.files.values())
    with progress_bar(total=total, label="reading shards", unit="B") as bar:
        for split, manifest in manifests.items():
            lines = list(_compare(folders[split], manifest, bar.update))
            findings += [line for line in lines if line is not None]
            size = sum(entry["size_bytes"] for entry in manifest.files.values())
            by_sample = lines.count(None)
            checked.append(CheckedShards(split, manifest.facts["samples"], len(manifest.files), size, by_sample))
    if findings:
        more = f"\nand {len(findings) - _MOST_LINES} more" * (len(findings) > _MOST_LINES)
        raise UserError(
            "\n".join(findings[:_MOST_LINES]) + more + "\nRestore these files from a copy of the shards. If there is "
            f"none, remove their folder and make the shards again with `{kinds.SHARDS.made_by}`"
        )
    return checked


def format_shards(checked: list[CheckedShards]) -> str:
    """Formats what was compared, a line for each split."""
    lines = []
    for split in checked:
        whole = split.num_files - split.by_sample
        ways = [f"{split.by_sample} sample by sample"] * (split.by_sample > 0) + [f"{whole} as a whole"] * (whole > 0)
        lines.append(
            f"{split.split}: {split.num_samples:,} samples in {split.num_files:,} files, {gigabytes(split.num_bytes)}: "
            f"as they were written (compared {', '.join(ways)})"
        )
    return "\n".join(lines)


def _compare(folder: Path, manifest: Manifest, advance: Callable[[int], Any]) -> Iterator[str | None]:
    """Yields a line for each changed file or sample, and None for each unchanged file that has hashes of samples."""
    # The index comes first, because the other hashes are in it.
    digest = hash_files(folder, only={INDEX: {}})[INDEX]["sha256"]
    if digest != manifest.files[INDEX]["sha256"]:
        yield f"{folder / INDEX}: {NOT_AS_RECORDED}, so the shards' hashes are unknown"
        return
    by_sample: dict[str, tuple[Mapping[str, Any], int]] = {}  # {file: its shard, number of samples before it}
    before = 0
    for shard in read_index(folder / INDEX):
        if shard.get("zip_data") is None and HASH_OF_SAMPLES in shard["raw_data"]["hashes"]:
            by_sample |= {name: (shard, before) for name in files_of(shard)}
        before += shard["samples"]
    for name, entry in manifest.files.items():
        if name in by_sample:
            lines = list(_compare_samples(folder / name, *by_sample[name], entry["sha256"], advance))
            yield from lines
            if not lines:
                yield None
            continue
        if _sha256(folder / name, advance) != entry["sha256"]:
            yield f"{folder / name}: {NOT_AS_RECORDED}"


def _compare_samples(
    path: Path, shard: Mapping[str, Any], before: int, sha256: str, advance: Callable[[int], Any]
) -> Iterator[str]:
    """Yields a line for each sample of a shard that has changed, or one for what comes before its samples."""
    digests = bytes.fromhex(shard["raw_data"]["hashes"][HASH_OF_SAMPLES])
    whole = hashlib.sha256()
    changed = []
    with path.open("rb") as file:
        head = file.read(4 * (shard["samples"] + 2))  # the number of samples, and their offsets, all uint32
        places = np.frombuffer(head, np.uint32)[1:].astype(np.int64)
        if int(places[0]) < len(head) or int(places[-1]) != shard["raw_data"]["bytes"] or (np.diff(places) < 0).any():
            yield f"{path}: the places of its samples have changed"
            return
        head += file.read(int(places[0]) - len(head))  # the columns
        whole.update(head)
        advance(len(head))
        for number, size in enumerate(np.diff(places).tolist()):
            digest = xxhash.xxh3_64()
            for start in range(0, size, _PIECE):
                piece = file.read(min(_PIECE, size - start))
                digest.update(piece)
                whole.update(piece)
                advance(len(piece))
            if digest.digest() != digests[8 * number : 8 * (number + 1)]:
                changed.append(number)
    for number in changed:
        yield f"{path}: its sample {number} (sample_id {before + number}) is not what the index says"
    if not changed and whole.hexdigest() != sha256:
        yield f"{path}: the description of its columns, before its samples, is not what the manifest says"


def _sha256(path: Path, advance: Callable[[int], Any]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()
