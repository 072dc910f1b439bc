import shutil

import numpy as np
import pytest
import torch
from conftest import open_dataset
from streaming.base.partition import get_partitions

from dskd.random_numbers import random_bits
from dskd.shards import COLUMNS, Collator, SensePositions, gather_rows, join_blocks, write_block

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


def test_a_batch_points_at_the_rows_of_its_samples(tmp_path):
    from safetensors.torch import save_file

    vectors = torch.arange(60.0).unsqueeze(-1).repeat(1, 3).bfloat16()
    save_file({"vectors": vectors}, tmp_path / "v.safetensors")
    samples = [_sample(0, 4), _sample(1, 9)]
    rule = SensePositions(1, 0.5, 0)
    batch = Collator(tmp_path / "v.safetensors", rule)(samples)
    assert next(iter(batch.values())).shape[0] == 2  # mosaicml-streaming counts samples by the first value
    assert batch["labels"][:, :-1].equal(batch["input_ids"][:, 1:])
    assert batch["sample_ids"].tolist() == [4, 9]
    senses = batch["senses"]
    for positions, index, column in (
        ("relation_positions", "synonym_index", "synonym_ids"),
        ("relation_positions", "antonym_index", "antonym_ids"),
        ("own_positions", "own_index", "sense_ids"),
    ):
        for position, places in zip(senses[positions].tolist(), senses[index].tolist(), strict=True):
            expected = samples[position // T][column][position % T]
            found = [-1 if place < 0 else int(senses["sense_rows"][place, 0]) for place in places]
            assert found == expected.tolist()


def test_positions_begin_anew_where_documents_start():
    samples = [_sample(0, 4), _sample(1, 9)]
    assert "position_ids" not in Collator(None, None)(samples)
    samples[1]["document_starts"][[3, 4, 19]] = 1
    batch = Collator(None, None)(samples)
    assert next(iter(batch)) == "input_ids"
    assert batch["position_ids"].tolist() == [list(range(T)), [0, 1, 2, 0, *range(15), 0]]


def test_blocks_join_to_one_dataset_whoever_wrote_them(tmp_path):
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


@pytest.mark.parametrize(("nodes", "ranks", "workers"), [(1, 1, 0), (1, 2, 2), (1, 4, 1), (2, 2, 1), (2, 4, 2)])
def test_any_number_of_ranks_sees_the_same_global_batches(nodes, ranks, workers):
    """The layout `train.micro_batches` relies on: one canonical node, and the global batch in micro-batches."""
    samples, global_batch, micro_batch = 96, 16, 2

    def batches(nodes, ranks, workers, start=0):
        ids = get_partitions(
            "relaxed", samples, 1, nodes, ranks, max(1, workers), micro_batch, start, initial_physical_nodes=1
        )
        world = nodes * ranks
        per_rank = ids.reshape(world, max(1, workers), -1, micro_batch)
        # A loader takes batches from its workers in turn.
        streams = per_rank.transpose(0, 2, 1, 3).reshape(world, -1, micro_batch)
        accumulation = global_batch // (world * micro_batch)
        steps = (samples - start) // global_batch
        return [set(streams[:, s * accumulation : (s + 1) * accumulation].ravel().tolist()) for s in range(steps)]

    expected = batches(1, 1, 0)
    assert [len(batch) for batch in expected] == [global_batch] * 6
    assert batches(nodes, ranks, workers) == expected
    assert batches(nodes, ranks, workers, start=32) == expected[2:]


def test_priorities_of_positions_do_not_repeat():
    assert len(random_bits(0, 0, 0, 1, torch.arange(1000)).unique()) == 1000
