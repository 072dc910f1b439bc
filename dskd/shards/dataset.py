"""The dataset of shards; in its own module because mosaicml-streaming takes seconds to import.

It relies on parts of the library that its documentation does not promise: `StreamingDataset.resample_streams`,
`on_exception` and `_event`, `Stream.validate_hash`, and the attributes of `MDSReader`. Look at them when the bound of
its version in pyproject.toml moves.
"""

import struct
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.format.mds import MDSReader

from dskd.artifacts.mds import HASH_OF_SAMPLES
from dskd.shards.sample_files import MappedFiles, SampleInFile
from dskd.shards.schema import TEACHER_STATES, TRUNK_STATES


class ShardDataset(StreamingDataset):
    """A dataset of mosaicml-streaming whose samples also hold their id, the epoch, the step, and their place on disk.

    The arrays of a sample are read-only views of the mapped shard file. If the index has a hash of each sample, a
    sample is compared with it whenever it is read, which raises a ValueError; then a shard that was fetched is not
    compared as a whole.

    `order_by`: how many samples count as one shard when the order of an epoch is drawn; None for those of each file.
    The library shuffles whole shards first, so with another number the order is another one.
    """

    shards: list["_MappedShard"]
    samples_per_shard: np.ndarray
    sample_offset_per_shard: np.ndarray
    shards_per_stream: np.ndarray

    def __init__(self, *, order_by: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._order_by = order_by
        maps = MappedFiles()
        self.shards = [_MappedShard.of(shard, maps) for shard in self.shards]
        if all(shard.digests for shard in self.shards):
            for stream in self.streams:
                stream.validate_hash = None
        # The code that iterates the dataset sets these, in its own process.
        self.current_epoch = 0
        self.current_step = 0
        self.failure: BaseException | None = None  # the error that ended the iteration early

    def on_exception(self, future: Future) -> None:
        """Stores the error of a fetch that failed, and ends the iteration.

        The library raises the error in a thread, where nothing catches it, and the iteration would just end.
        """
        if error := future.exception():
            self.failure = error
            self._event.set()

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sizes of what is shuffled as shards, and the numbers of the samples of an epoch."""
        if self._order_by is None:
            return super().resample_streams(epoch, stream_id)
        total = int(self.samples_per_shard.sum())
        starts = np.arange(0, total, self._order_by)
        names = ("samples_per_shard", "sample_offset_per_shard", "shards_per_stream")
        of_files = {name: getattr(self, name) for name in names}
        self.samples_per_shard, self.sample_offset_per_shard = np.diff(starts, append=total), starts
        self.shards_per_stream = np.array([len(starts)])  # there is one stream
        try:
            return super().resample_streams(epoch, stream_id)
        finally:
            for name, value in of_files.items():
                setattr(self, name, value)

    @property
    def folder(self) -> Path:
        """The folder on this node that the shards are read from."""
        return Path(self.streams[0].local)  # there is one stream

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Returns the columns of a sample, and its `sample_id`, `epoch` and `step`.

        If it has states, `in_file` is its :class:`SampleInFile`.
        """
        sample = super().get_item(sample_id, retry)
        return {**sample, "sample_id": sample_id, "epoch": self.current_epoch, "step": self.current_step}


class _MappedShard(MDSReader):
    """A reader whose samples are views of the mapped file.

    The library's own copies each column four times before a batch has it, and reads a column's encoding from text each
    time. That is nearly all of the loader's work if shards hold states.
    """

    digests = b""  # of the samples, 8 bytes each; none if the index has none

    @classmethod
    def of(cls, shard: MDSReader, maps: MappedFiles) -> "_MappedShard":
        """Returns a reader of the same shard."""
        names = ("column_encodings", "column_names", "column_sizes", "compression", "hashes")
        more = ("dirname", "split", "raw_data", "samples", "size_limit", "zip_data")
        reader = cls(**{name: getattr(shard, name) for name in (*names, *more)})
        reader._maps = maps
        # All columns of the shards are arrays of one type and any shape: "ndarray:int32".
        types = [np.dtype(encoding.removeprefix("ndarray:")) for encoding in shard.column_encodings]
        reader._types = dict(zip(shard.column_names, types, strict=True))
        reader._path = str(Path(reader.dirname, reader.split, reader.raw_data.basename))
        if reader.zip_data is None:
            reader.digests = bytes.fromhex((reader.raw_data.hashes or {}).get(HASH_OF_SAMPLES, ""))
        return reader

    def get_item(self, idx: int) -> dict[str, Any]:
        """Returns the columns of a sample and, if it has states, its :class:`SampleInFile` as `in_file`.

        Raises:
            ValueError: if its bytes are not what the index says.
        """
        data, in_file = self._find(idx)
        sample: dict[str, Any] = {}
        states: dict[str, tuple[int, int]] = {}
        # The sizes of all columns come first, uint32. Each column begins with a byte, which gives the number of its
        # dimensions and the type of their sizes, and with these sizes.
        sizes = struct.unpack_from(f"<{len(self._types)}I", data)
        at = 4 * len(sizes)
        for (name, dtype), size in zip(self._types.items(), sizes, strict=True):
            dimensions, kind = divmod(data[at], 4)
            shape = struct.unpack_from(f"<{dimensions}{'BHIQ'[kind]}", data, at + 1)
            begin = at + 1 + (dimensions << kind)
            at += size
            array = sample[name] = np.ndarray(shape, dtype, data, begin)
            if begin + array.nbytes != at:
                raise ValueError(
                    f"{self.raw_data.basename}: column {name} of sample {idx} has another size than it says"
                )
            if name in (TEACHER_STATES, TRUNK_STATES):
                states[name] = (begin, array.nbytes)
        return {**sample, "in_file": replace(in_file, states=states)} if states else sample

    def get_sample_data(self, idx: int) -> Any:
        """Returns the bytes of a sample, as a view.

        Raises:
            ValueError: if they are not what the index says.
        """
        return self._find(idx)[0]

    def _find(self, idx: int) -> tuple[memoryview, SampleInFile]:
        path, size = self._path, self.raw_data.bytes
        mapped = self._maps.open(path, size)
        # A shard begins with its number of samples; their offsets follow, all uint32.
        begin, end = np.frombuffer(mapped, np.uint32, 2, offset=4 * (1 + idx)).tolist()
        data = mapped[begin:end]
        in_file = SampleInFile(path, size, idx, begin, len(data), self.digests[8 * idx : 8 * (idx + 1)], {})
        in_file.require_content(data)
        return data, in_file
