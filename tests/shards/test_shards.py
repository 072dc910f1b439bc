import json
import shutil

import numpy as np
import pytest
import torch
from artifact_folders import open_dataset
from safetensors.torch import save_file
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.partition import get_partitions

from dskd.random_numbers import random_bits
from dskd.shards import COLUMNS, gather_rows, join_blocks
from dskd.shards.writing import write_block
from dskd.training.collator import Collator
from dskd.training.positions import SensePositions

T, K = 20, 2


def _sample(seed=0, sample_id=4, epoch=0):
    random = np.random.default_rng(seed)
    ids = {name: np.full((T, K), -1, np.int32) for name in ("sense_ids", "synonym_ids", "antonym_ids")}
    ids["sense_ids"][:18, 0] = random.integers(0, 50, 18)
    ids["synonym_ids"][2:12, :] = random.integers(0, 50, (10, K))
    ids["antonym_ids"][8:14, 0] = random.integers(50, 60, 6)
    mask = np.ones(T, np.uint8)
    mask[[3, T - 1]] = 0
    return {
        "input_ids": random.integers(0, 9, T).astype(np.int32),
        "loss_mask": mask,
        "document_starts": (np.arange(T) % 20 == 0).astype(np.uint8),
        **ids,
        "sample_id": sample_id,
        "epoch": epoch,
    }


@pytest.mark.parametrize(
    ("share", "minimum", "expected"), [(0.5, 0, 6), (0.5, 8, 8), (0.5, 99, 11), (0.0, 0, 0), (1.0, 0, 11)]
)
def test_the_share_of_lexical_positions_is_drawn(share, minimum, expected):
    sample = _sample()  # lexical: 2 to 13 without the masked 3, eleven positions
    relation, own = SensePositions(1, share, minimum).draw(sample, 4, 0)
    assert len(relation) == len(own) == expected
    assert set(relation) <= set(range(2, 14)) - {3}
    assert set(own) <= set(range(18)) - {3}


def test_positions_are_a_function_of_seed_epoch_and_sample():
    sample, rule = _sample(), SensePositions(1, 0.5, 0)
    drawn = rule.draw(sample, 4, 0)
    assert all((a == b).all() for a, b in zip(drawn, rule.draw(sample, 4, 0), strict=True))
    for other in (rule.draw(sample, 5, 0), rule.draw(sample, 4, 1), SensePositions(2, 0.5, 0).draw(sample, 4, 0)):
        assert any(set(a) != set(b) for a, b in zip(drawn, other, strict=True))


def test_every_lexical_position_is_drawn_equally_often():
    sample, rule = _sample(), SensePositions(1, 0.5, 0)
    counts = np.zeros(T)
    for epoch in range(600):
        counts[rule.draw(sample, 4, epoch)[0]] += 1
    lexical = counts[[p for p in range(2, 14) if p != 3]]
    expected = 600 * 6 / 11
    assert abs(lexical - expected).max() < 6 * np.sqrt(expected * (1 - 6 / 11))


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


def _ragged(real_lengths):
    """Samples as `packing: none` makes them: some tokens, then padding, with rows of all kinds in the padding too."""
    samples = []
    for number, real in enumerate(real_lengths):
        sample = _sample(number, sample_id=100 + number)
        sample["loss_mask"] = (np.arange(T) < real - 1).astype(np.uint8)
        samples.append(sample)
    return samples


def _vectors(folder):
    save_file({"vectors": torch.arange(60.0).unsqueeze(-1).repeat(1, 3).bfloat16()}, folder / "v.safetensors")
    return folder / "v.safetensors"


def _by_id(samples):
    return {sample["sample_id"]: sample for sample in samples}


def test_a_batch_points_at_the_rows_of_its_samples(tmp_path):
    samples = [_sample(0, 4), _sample(1, 9)]
    rule = SensePositions(1, 0.5, 0)
    (batch,) = Collator(_vectors(tmp_path), rule, micro_batch_size=2)(samples)
    assert batch["labels"][:, :-1].equal(batch["input_ids"][:, 1:])
    assert batch["sample_ids"].tolist() == [4, 9]
    senses = batch["senses"]
    for positions, index, column in (
        ("relation_positions", "synonym_rows", "synonym_ids"),
        ("relation_positions", "antonym_rows", "antonym_ids"),
        ("own_positions", "own_rows", "sense_ids"),
    ):
        assert len(senses[positions])
        for position, places in zip(senses[positions].tolist(), senses[index].tolist(), strict=True):
            expected = samples[position // T][column][position % T]
            found = [-1 if place < 0 else int(senses["sense_rows"][place, 0]) for place in places]
            assert found == expected.tolist()


def test_a_step_is_cut_into_micro_batches_by_length():
    # 1 and 2 tokens have no and one target; 20 tokens of 20 leave 19 positions; lengths are rounded up to 8, 16 and 20.
    samples = _ragged([9, 1, 20, 2, 18, 10, 17, 3])
    batches = Collator(None, None, micro_batch_size=2)(samples)
    assert [batch["sample_ids"].tolist() for batch in batches] == [[102, 104], [106, 105], [100, 107], [103, 101]]
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 20), (2, 16), (2, 8), (2, 8)]
    counts = {sample["sample_id"]: int(sample["loss_mask"].sum()) for sample in samples}
    for batch in batches:
        assert batch["loss_mask"].sum(1).tolist() == [counts[i] for i in batch["sample_ids"].tolist()]
        assert {tensor.shape for name, tensor in batch.items() if name != "sample_ids"} == {batch["input_ids"].shape}


def test_equal_lengths_keep_their_order():
    samples = [_sample(number, number) for number in (5, 3, 8, 1)]
    batches = Collator(None, None, micro_batch_size=2)(samples)
    assert [batch["sample_ids"].tolist() for batch in batches] == [[5, 3], [8, 1]]


def test_a_step_sums_up_the_same_in_any_micro_batches(tmp_path):
    """The sum of any function of position, token, label and rows equals a brute-force sum over untrimmed samples."""
    samples = _ragged([9, 1, 20, 2, 18, 10, 17, 3])
    for sample in samples:
        sample["document_starts"][5] = 1
    rule = SensePositions(1, 0.5, 3)
    expected = {"tokens": 0, "relation_positions": 0, "own_positions": 0}
    for sample in samples:
        ids = sample["input_ids"].astype(int)
        for position in np.flatnonzero(sample["loss_mask"]):
            in_document = position - 5 if position >= 5 else position
            expected["tokens"] += (in_document + 1) * (7 * ids[position] + ids[position + 1]) ** 2
        drawn = rule.draw(sample, sample["sample_id"], 0)
        for name, positions in zip(("relation_positions", "own_positions"), drawn, strict=True):
            columns = ("synonym_ids", "antonym_ids") if name == "relation_positions" else ("sense_ids",)
            for position in positions:
                rows = sum((k + 1) * int(sample[c][position, k] + 1) for k in range(K) for c in columns)
                expected[name] += (ids[position] + 2) * rows
    for size in (1, 2, 4, 8):
        found = dict.fromkeys(expected, 0)
        for batch in Collator(_vectors(tmp_path), rule, micro_batch_size=size)(samples):
            ids, labels = batch["input_ids"], batch["labels"]
            length = ids.shape[1]
            places = batch.get("position_ids", torch.arange(length).expand_as(ids))
            found["tokens"] += int(((places + 1) * (7 * ids + labels) ** 2)[batch["loss_mask"]].sum())
            senses = batch["senses"]
            row_number = torch.cat([senses["sense_rows"][:, 0].long(), torch.tensor([-1])])  # index -1 is no row
            for name, indices in (
                ("relation_positions", ("synonym_rows", "antonym_rows")),
                ("own_positions", ("own_rows",)),
            ):
                assert batch["loss_mask"].flatten()[senses[name]].all()
                rows = sum(row_number[senses[index]] + 1 for index in indices)
                weighted = (rows * torch.arange(1, K + 1)).sum(1)
                found[name] += int(((ids.flatten()[senses[name]] + 2) * weighted).sum())
        assert found == expected, size
    assert expected["relation_positions"] and expected["own_positions"]


def test_batches_hold_row_numbers_if_the_device_holds_all_rows(tmp_path):
    samples, rule = _ragged([9, 20, 18, 12]), SensePositions(1, 0.5, 3)
    on_host = Collator(_vectors(tmp_path), rule, micro_batch_size=2)(samples)
    on_device = Collator(None, rule, micro_batch_size=2)(samples)
    bank = torch.arange(60.0).unsqueeze(-1).repeat(1, 3).bfloat16()
    for host, device in zip(on_host, on_device, strict=True):
        assert "sense_rows" not in device["senses"]
        for name in ("relation_positions", "own_positions"):
            assert host["senses"][name].equal(device["senses"][name])
        for name in ("synonym_rows", "antonym_rows", "own_rows"):
            named, row_numbers = host["senses"][name], device["senses"][name]
            assert row_numbers.dtype == torch.int64
            assert (named < 0).equal(row_numbers < 0)
            exists = named >= 0
            assert host["senses"]["sense_rows"][named[exists]].equal(bank[row_numbers[exists]])


def test_batches_hold_the_teachers_distributions_only_if_requested():
    samples = _ragged([9, 20, 18, 3])
    random = np.random.default_rng(0)
    for sample in samples:
        sample["teacher_token_ids"] = random.integers(0, 99, (T, 3)).astype(np.int32)
        sample["teacher_logprobs"] = random.normal(size=(T, 3)).astype(np.float16)
        sample["teacher_rest_logprob"] = random.normal(size=T).astype(np.float32)
    plain = Collator(None, None, micro_batch_size=2)(samples)
    assert all(set(batch) == {"input_ids", "labels", "loss_mask", "sample_ids"} for batch in plain)
    by_id = _by_id(samples)
    for batch in Collator(None, None, micro_batch_size=2, teacher_cache=True)(samples):
        length = batch["input_ids"].shape[1]
        for name, dtype in (("token_ids", "int32"), ("logprobs", "float16"), ("rest_logprob", "float32")):
            column = batch["teacher_cache"][name].numpy()
            assert column.dtype == dtype
            for row, sample_id in zip(column, batch["sample_ids"].tolist(), strict=True):
                assert np.array_equal(row, by_id[sample_id][f"teacher_{name}"][:length])


def test_position_ids_restart_at_each_document():
    samples = [_sample(0, 4), _sample(1, 9)]
    collate = Collator(None, None, micro_batch_size=2)
    assert "position_ids" not in collate(samples)[0]
    samples[1]["document_starts"][[3, 4, 19]] = 1
    (batch,) = collate(samples)
    assert batch["position_ids"].tolist() == [list(range(T)), [0, 1, 2, 0, *range(15), 0]]


def test_joined_blocks_are_one_dataset_whichever_rank_wrote_them(tmp_path):
    samples = [{name: _sample(index)[name] for name in COLUMNS} for index in range(7)]
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


@pytest.mark.parametrize("most_bytes", [None, 4000])
def test_shards_that_are_not_compressed_have_the_bytes_that_the_library_writes(tmp_path, monkeypatch, most_bytes):
    monkeypatch.setattr("dskd.shards.unpacked_writer._LARGE", 1000)
    columns = {**COLUMNS, "teacher_states": "ndarray:uint16", "trunk_states": "ndarray:float32"}
    samples = [{name: _sample(index)[name] for name in COLUMNS} for index in range(7)]
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
    """The layout `dskd.training.loader` relies on: one canonical node, and batches of a rank's samples of a step."""
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


def test_priorities_of_positions_do_not_repeat():
    assert len(random_bits(0, 0, 0, 1, torch.arange(1000)).unique()) == 1000
