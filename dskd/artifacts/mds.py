"""Reads MDS shards from a folder without mosaicml-streaming's datasets, which need shared memory and a cache.

Holds one shard at a time in memory, unpacked and checked against the index. If only some columns are read, it maps
shards that are not packed instead. Writes nothing, and never decodes columns that would run code (pickles).
"""

import json
import mmap
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dskd.artifacts.pointers import refuse_pointer_beginning
from dskd.errors import UserError

INDEX = "index.json"
# Among the hashes of a shard file that is not packed: the xxh3_64 (half the time of xxh64) of each sample's bytes, in
# order, as one hex text. So who reads a few samples of a large shard can check these without reading the others.
HASH_OF_SAMPLES = "xxh3_64_of_samples"
_COUNT_BYTES = 4  # a shard begins with its number of samples; their offsets follow, all uint32


def read_index(index: Path) -> list[dict[str, Any]]:
    """Returns the shards that an index lists.

    Raises:
        UserError: if it is not an index of MDS shards.
    """
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: this is not an index of MDS shards") from None
    if not isinstance(shards, list):
        raise UserError(f"{index}: this is not an index of MDS shards: 'shards' is not a list")
    for shard in shards:
        kind = shard.get("format") if isinstance(shard, dict) else shard
        if kind != "mds":
            raise UserError(f"{index}: expected shards of the format 'mds', found {kind!r}; write the text as MDS")
        for name in files_of(shard):
            if not (index.parent / name).resolve().is_relative_to(index.parent.resolve()):
                raise UserError(f"{index}: it names {name}, which is outside of its folder; write the shards again")
    return shards


def files_of(shard: Mapping[str, Any]) -> list[str]:
    """Returns the names of a shard's unpacked and packed files, as the index gives them."""
    parts = (shard.get("raw_data"), shard.get("zip_data"))
    return [part["basename"] for part in parts if isinstance(part, dict) and isinstance(part.get("basename"), str)]


def files_with_hashes_of_samples(index: Path) -> list[str]:
    """Returns the names of the shard files whose samples can be checked one by one, when they are read.

    Raises:
        UserError: if it is not an index of MDS shards.
    """
    shards = [shard for shard in read_index(index) if shard.get("zip_data") is None]
    return [name for shard in shards if HASH_OF_SAMPLES in shard["raw_data"]["hashes"] for name in files_of(shard)]


def read_samples(
    index: Path, *, column: str | None = None, columns: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the samples of all shards, in order.

    Args:
        index: the `index.json`.
        column: the only column to decode, as text.
        columns: the only columns to decode, arrays. Of a shard that is not packed, the others are then not read, which
            can be nearly all of it, nor is its hash compared. None decodes all.

    Raises:
        UserError: naming the shard that is missing, damaged or does not match the index.
    """
    from streaming.base.format.mds import MDSReader

    for shard in read_index(index):
        try:
            if column is not None:
                encodings = ["str" if name == column else "bytes" for name in shard["column_names"]]
                shard = shard | {"column_encodings": encodings}
            elif columns is not None:
                named = zip(shard["column_names"], shard["column_encodings"], strict=True)
                shard = shard | {"column_encodings": [kind if name in columns else "bytes" for name, kind in named]}
            reader = MDSReader.from_json(str(index.parent), None, shard)
            reader.validate(False)  # refuses columns that would run code
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{index}: this entry does not describe an MDS shard ({error!r}): {json.dumps(shard)[:200]}"
            ) from None
        path, data = _unpacked(index.parent, reader, maps=columns is not None)
        try:
            places = np.frombuffer(data, np.uint32, reader.samples + 1, offset=_COUNT_BYTES).tolist()
            for begin, end in pairwise(places):
                sample = reader.decode_sample(data[begin:end])
                names = columns or (sample if column is None else (column,))
                yield {name: sample[name] for name in names}
        except (ValueError, IndexError, TypeError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(f"{path}: damaged: a sample cannot be decoded ({error}); fetch it again") from None


def _unpacked(folder: Path, reader: Any, *, maps: bool) -> tuple[Path, bytes | memoryview]:
    """Returns a shard's file and its unpacked content, which is mapped if `maps` and it is not packed."""
    from streaming.base.compression import decompress
    from streaming.base.hashing import get_hash

    raw = reader.zip_data is None or (folder / reader.raw_data.basename).is_file()
    stored = reader.raw_data if raw else reader.zip_data
    path = folder / stored.basename
    data: bytes | memoryview
    try:
        if raw and maps:
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        else:
            data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = getattr(error, "strerror", error)
        raise UserError(f"{path}: cannot be read ({reason}), but {INDEX} names it; fetch it again") from None
    refuse_pointer_beginning(bytes(data[:64]), path)
    for algorithm, expected in {} if isinstance(data, memoryview) else (stored.hashes or {}).items():
        if algorithm != HASH_OF_SAMPLES and get_hash(algorithm, data) != expected:
            raise UserError(
                f"{path}: the content is not what {INDEX} says: truncated or changed; fetch or make it again"
            )
    if not raw:
        try:
            data = decompress(reader.compression, data)
        except Exception as error:  # each of the five codecs raises its own errors
            raise UserError(f"{path}: cannot be unpacked ({error}); was it truncated? Fetch it again") from None
    if len(data) != reader.raw_data.bytes:
        raise UserError(
            f"{path}: {len(data)} bytes, but {INDEX} says {reader.raw_data.bytes}; was its download or copy truncated? "
            "Fetch it again"
        )
    return path, data
