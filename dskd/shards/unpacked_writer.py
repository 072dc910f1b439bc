"""A writer of shards that are not compressed; in its own module because mosaicml-streaming takes seconds to import."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from streaming import MDSWriter
from streaming.base.format.mds.encodings import NDArray, mds_encode

from dskd.artifacts.mds import HASH_OF_SAMPLES
from dskd.shards.schema import HASH

_LARGE = 2**17  # bytes of an array of which a copy takes longer than the code that avoids it


@dataclass(frozen=True)
class _Pieces:
    """The parts of a sample in a shard file, in order; its length is their bytes."""

    parts: list[bytes | memoryview]

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class UnpackedWriter(MDSWriter):
    """The library's writer, without the six copies that it makes of each sample: arrays are written from their place.

    States are nearly all bytes of a sample, and Python runs nothing else during the library's copies, so they would
    slow the teacher. The files are the same; the index also has a hash of each sample. `sha256` has that of each file.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sha256: dict[str, str] = {}

    def encode_sample(self, sample: Mapping[str, np.ndarray]) -> Any:
        """Returns the sample's parts; the library needs only their length."""
        parts: list[bytes | memoryview] = []
        sizes = []
        for name, encoding in zip(self.column_names, self.column_encodings, strict=True):
            array = sample[name]
            column = _large(encoding, array) if array.nbytes > _LARGE else [mds_encode(encoding, array)]
            sizes.append(sum(map(len, column)))
            parts += column
        return _Pieces([np.array(sizes, np.uint32).tobytes(), *parts])

    def flush_shard(self) -> None:
        """Writes the samples so far as a shard, and adds it to the index."""
        name, _ = self._name_next_shard()
        places = np.array([0, *map(len, self.new_samples)]).cumsum().astype(np.uint32)
        places += 4 + places.nbytes + len(self.config_data)
        head = np.uint32(len(self.new_samples)).tobytes() + places.tobytes() + self.config_data
        whole, of_file, of_samples = xxhash.xxh64(head), hashlib.sha256(head), []
        with (Path(self.local) / name).open("wb") as file:
            file.write(head)
            for sample in self.new_samples:
                digest = xxhash.xxh3_64()
                for part in sample.parts:
                    file.write(part)
                    whole.update(part)
                    of_file.update(part)
                    digest.update(part)
                of_samples.append(digest.hexdigest())
        self.sha256[name] = of_file.hexdigest()
        hashes = {HASH: whole.hexdigest(), HASH_OF_SAMPLES: "".join(of_samples)}
        raw = {"basename": name, "bytes": int(places[-1]), "hashes": hashes}
        self.shards.append({"samples": len(self.new_samples), "raw_data": raw, "zip_data": None, **self.get_config()})


def _large(encoding: str, array: np.ndarray) -> list[bytes | memoryview]:
    """Returns what the library's encoding of an array consists of: its dimensions, and its values in their place."""
    mds_encode(encoding, array.reshape(-1)[:1])  # the library refuses an array of another type
    shape = np.array(array.shape, np.int64)
    kind = NDArray._rightsize_shape_dtype(shape)
    head = bytes([array.ndim << 2 | NDArray._shape_dtype2int[kind]]) + shape.astype(kind).tobytes()
    return [head, np.ascontiguousarray(array).data.cast("B")]
