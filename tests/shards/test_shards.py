import errno
import json
import shutil

import numpy as np
import pytest
import torch
from artifact_folders import open_dataset
from shard_samples import make_sample
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.partition import get_partitions

from dskd.shards import COLUMNS, gather_rows, join_blocks
from dskd.shards.writing import write_block


def test_rows_are_read_once_and_pointed_to():
    vectors = np.arange(40, dtype=np.uint16).reshape(10, 4)
    ids = [np.array([[7, -1], [2, 7]]), np.array([[-1, -1]]), np.empty((0, 2), np.int64)]
    rows, indices = gather_rows(vectors, ids)
    assert rows.dtype == torch.bfloat16
    assert rows.view(torch.int16)[:, 0].tolist() == [8, 28]
    for original, index in zip(ids, indices, strict=True):
        assert index.shape == original.shape
        for row, place in zip(original.ravel(), index.ravel().tolist(), strict=True):
            assert (place == -1) == (row == -1)
            if row >= 0:
                assert rows.view(torch.int16)[place].tolist() == vectors[row].tolist()


def test_no_padding_and_no_rows_are_fine():
    vectors = np.arange(8, dtype=np.uint16).reshape(2, 4)
    rows, (index,) = gather_rows(vectors, [np.array([[1, 0]])])
    assert index.tolist() == [[1, 0]]
    rows, (index,) = gather_rows(vectors, [np.full((1, 2), -1)])
    assert (rows.shape, index.tolist()) == ((0, 4), [[-1, -1]])


def test_joined_blocks_are_one_dataset_whichever_rank_wrote_them(tmp_path):
    samples = [{name: make_sample(index)[name] for name in COLUMNS} for index in range(7)]
    contents = []
    for folder, order in (("one", (0, 1, 2)), ("two", (2, 0, 1))):
        blocks = [samples[:3], samples[3:6], samples[6:]]
        target = tmp_path / folder
        for number in order:
            write_block(target / ".blocks" / str(number), iter(blocks[number]))
        assert join_blocks(target, [target / ".blocks" / str(number) for number in range(3)]) == 7
        shutil.rmtree(target / ".blocks")
        contents.append({file.name: file.read_bytes() for file in target.iterdir()})
    assert contents[0] == contents[1]
    dataset = open_dataset(tmp_path / "one", tmp_path / "cache")
    assert len(dataset) == 7
    for index, sample in enumerate(samples):
        for name in COLUMNS:
            assert np.array_equal(dataset[index][name], sample[name])


def test_blocks_are_joined_without_copies_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    samples = [{name: make_sample(index)[name] for name in COLUMNS} for index in range(4)]
    blocks = [tmp_path / "blocks" / str(number) for number in range(2)]
    for number, block in enumerate(blocks):
        write_block(block, samples[2 * number : 2 * number + 2])
    (tmp_path / "linked").mkdir()
    join_blocks(tmp_path / "linked", blocks)
    links = []

    def link(old, new):
        links.append(old)
        if len(links) == 2:
            raise KeyboardInterrupt  # the process is killed after the first file
        raise OSError(errno.EPERM, "the file system has no links")

    monkeypatch.setattr("os.link", link)
    (tmp_path / "moved").mkdir()
    inodes = {file.stat().st_ino for block in blocks for file in block.glob("*.mds*")}
    with pytest.raises(KeyboardInterrupt):
        join_blocks(tmp_path / "moved", blocks)
    assert join_blocks(tmp_path / "moved", blocks) == 4
    content = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("linked", "moved")]
    assert content[0] == content[1]
    assert {file.stat().st_ino for file in (tmp_path / "moved").glob("*.mds*")} == inodes  # nothing was copied


@pytest.mark.parametrize("most_bytes", [None, 4000])
def test_shards_that_are_not_compressed_have_the_bytes_that_the_library_writes(tmp_path, monkeypatch, most_bytes):
    monkeypatch.setattr("dskd.shards.unpacked_writer._LARGE", 1000)
    columns = {**COLUMNS, "teacher_states": "ndarray:uint16", "trunk_states": "ndarray:float32"}
    samples = [{name: make_sample(index)[name] for name in COLUMNS} for index in range(7)]
    for index, sample in enumerate(samples):
        sample["teacher_states"] = np.arange((index + 1) * 300, dtype=np.uint16).reshape(index + 1, 300)
        sample["trunk_states"] = np.full((40, 9), index, np.float32)[: index + 1]  # a part of a larger array
    write_block(tmp_path / "ours", samples, columns, compression=None, most_bytes=most_bytes)
    with MDSWriter(out=str(tmp_path / "its"), columns=columns, hashes=["xxh64"], size_limit=most_bytes) as writer:
        for sample in samples:
            writer.write(sample)
    ours, its = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("ours", "its"))
    index, expected = (json.loads(files.pop("index.json")) for files in (ours, its))
    assert ours == its
    for shard in index["shards"]:
        reader = MDSReader.from_json(str(tmp_path / "its"), None, shard)
        hashes = [get_hash("xxh3_64", reader.get_sample_data(number)) for number in range(shard["samples"])]
        assert shard["raw_data"]["hashes"].pop("xxh3_64_of_samples") == "".join(hashes)
    assert index == expected  # but for the hashes of samples
    assert (len(its) > 1) == (most_bytes is not None)
    with pytest.raises(ValueError, match="Wrong dtype"):
        write_block(tmp_path / "bad", [{**samples[0], "trunk_states": np.ones((2, 2))}], columns, compression=None)


@pytest.mark.parametrize(("nodes", "ranks", "workers"), [(1, 1, 0), (1, 2, 2), (1, 4, 1), (2, 2, 1), (2, 4, 2)])
def test_any_number_of_ranks_sees_the_same_global_batches(nodes, ranks, workers):
    """The layout `dskd.training.data.loader` relies on: one canonical node, and batches of a rank's samples."""
    samples, global_batch = 96, 16

    def batches(nodes, ranks, workers, start=0):
        world, workers = nodes * ranks, max(1, workers)
        per_rank = global_batch // world
        ids = get_partitions("relaxed", samples, 1, nodes, ranks, workers, per_rank, start, initial_physical_nodes=1)
        # A loader takes batches from its workers in turn.
        streams = ids.reshape(world, workers, -1, per_rank).transpose(0, 2, 1, 3).reshape(world, -1, per_rank)
        steps = (samples - start) // global_batch
        return [set(streams[:, step].ravel().tolist()) for step in range(steps)]

    expected = batches(1, 1, 0)
    assert [len(batch) for batch in expected] == [global_batch] * 6
    assert batches(nodes, ranks, workers) == expected
    assert batches(nodes, ranks, workers, start=32) == expected[2:]
