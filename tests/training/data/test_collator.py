import numpy as np
import torch
from safetensors.torch import save_file
from shard_samples import K, T, make_ragged, make_sample

from dskd.training.data.collator import Collator
from dskd.training.data.packed_step import count_positions
from dskd.training.data.positions import SensePositions, TargetPositions


def _vectors(folder):
    save_file({"vectors": torch.arange(60.0).unsqueeze(-1).repeat(1, 3).bfloat16()}, folder / "v.safetensors")
    return folder / "v.safetensors"


def _by_id(samples):
    return {sample["sample_id"]: sample for sample in samples}


def test_a_batch_points_at_the_rows_of_its_samples(tmp_path):
    samples = [make_sample(0, 4), make_sample(1, 9)]
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
            found = [-1 if place < 0 else int(senses["sense_rows"].read()[place, 0]) for place in places]
            assert found == expected.tolist()


def test_a_step_is_cut_into_micro_batches_by_length():
    # 1 and 2 tokens have no and one target; 20 tokens of 20 leave 19 positions; lengths are rounded up to 8, 16 and 20.
    samples = make_ragged([9, 1, 20, 2, 18, 10, 17, 3])
    batches = Collator(None, None, micro_batch_size=2)(samples)
    assert [batch["sample_ids"].tolist() for batch in batches] == [[102, 104], [106, 105], [100, 107], [103, 101]]
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 20), (2, 16), (2, 8), (2, 8)]
    counts = {sample["sample_id"]: int(sample["loss_mask"].sum()) for sample in samples}
    for batch in batches:
        assert batch["loss_mask"].sum(1).tolist() == [counts[i] for i in batch["sample_ids"].tolist()]
        assert {tensor.shape for name, tensor in batch.items() if name != "sample_ids"} == {batch["input_ids"].shape}


def test_equal_lengths_keep_their_order():
    samples = [make_sample(number, number) for number in (5, 3, 8, 1)]
    batches = Collator(None, None, micro_batch_size=2)(samples)
    assert [batch["sample_ids"].tolist() for batch in batches] == [[5, 3], [8, 1]]


def test_a_step_sums_up_the_same_in_any_micro_batches(tmp_path):
    """The sum of any function of position, token, label and rows equals a brute-force sum over untrimmed samples."""
    samples = make_ragged([9, 1, 20, 2, 18, 10, 17, 3])
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
            row_number = torch.cat(
                [senses["sense_rows"].read()[:, 0].long(), torch.tensor([-1])]
            )  # index -1 is not a row
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
    samples, rule = make_ragged([9, 20, 18, 12]), SensePositions(1, 0.5, 3)
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
            assert host["senses"]["sense_rows"].read()[named[exists]].equal(bank[row_numbers[exists]])


def test_batches_hold_the_teachers_distributions_only_if_requested():
    samples = make_ragged([9, 20, 18, 3])
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
    samples = [make_sample(0, 4), make_sample(1, 9)]
    collate = Collator(None, None, micro_batch_size=2)
    assert "position_ids" not in collate(samples)[0]
    samples[1]["document_starts"][[3, 4, 19]] = 1
    (batch,) = collate(samples)
    assert batch["position_ids"].tolist() == [list(range(T)), [0, 1, 2, 0, *range(15), 0]]


def test_any_micro_batches_have_the_same_drawn_targets_and_senses_do_not_depend_on_them(tmp_path):
    samples = make_ragged([9, 1, 20, 2, 18, 10, 17, 3])
    rule, targets = SensePositions(1, 0.5, 3), TargetPositions(1, 0.4)
    drawn = {sample["sample_id"]: targets.draw_each([sample])[0] for sample in samples}
    with_target = sum(int(sample["loss_mask"].sum()) for sample in samples)
    assert 0.3 < sum(map(sum, drawn.values())) / with_target < 0.5
    for size in (1, 2, 8):
        plain = Collator(_vectors(tmp_path), rule, micro_batch_size=size, lexical=True)(samples)
        batches = Collator(_vectors(tmp_path), rule, micro_batch_size=size, lexical=True, targets=targets)(samples)
        for batch, without in zip(batches, plain, strict=True):
            length = batch["input_ids"].shape[1]
            for row, sample_id in zip(batch["drawn_targets"].numpy(), batch["sample_ids"].tolist(), strict=True):
                assert np.array_equal(row, drawn[sample_id][:length])
                assert not drawn[sample_id][length:].any()
            assert batch["loss_mask"].equal(without["loss_mask"])
            assert all(batch["senses"][name].equal(without["senses"][name]) for name in ("own_positions", "own_rows"))
        counts, whole = count_positions(batches), count_positions(plain)
        assert counts.targets == sum(map(sum, drawn.values()))
        assert counts.lexical < whole.lexical
        assert counts[1:3] == whole[1:3]
        assert counts.tokens == whole.tokens == whole.targets == with_target
