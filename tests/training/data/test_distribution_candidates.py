"""The rows over which teacher and student are compared, against sets that a loop over the samples collects."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dskd.config import LossConfig
from dskd.training.data.collator import Collator
from dskd.training.data.distribution_candidates import CandidateRows
from dskd.training.data.positions import SensePositions

T, K, ROWS, STEP = 16, 3, 40, 5
ALL = ("own", "synonym", "antonym", "random")
COLUMNS = {"own": "sense_ids", "synonym": "synonym_ids", "antonym": "antonym_ids"}


def _samples():
    """Returns 8 samples of few rows, so that some are in several columns of a position and among the random ones."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(8):
        ids = {column: random.integers(0, ROWS // 2, (T, K)).astype(np.int32) for column in COLUMNS.values()}
        for column in ids.values():
            column[random.random(T) < 0.4] = -1
            column[random.random(T) < 0.3, 1:] = -1
        samples.append(
            {
                "input_ids": random.integers(0, 9, T).astype(np.int32),
                "loss_mask": (np.arange(T) < random.integers(6, T)).astype(np.uint8),
                "document_starts": (np.arange(T) == 0).astype(np.uint8),
                **ids,
                "sample_id": 100 + number,
                "epoch": 1,
                "step": STEP,
            }
        )
    return samples


def _candidates(kinds=ALL, *, seed=3, number=12, rows=ROWS):
    loss = LossConfig(
        sense_form="distribution",
        sense_candidates=kinds,
        **({"sense_random_candidates": number} if "random" in kinds else {}),
    )
    return CandidateRows.of(loss, seed, rows)


@pytest.mark.parametrize("kinds", [ALL, ("own", "random"), ("synonym", "antonym"), ("random",)])
@pytest.mark.parametrize("place_of_rows", ["in the batch", "on the device"])
def test_a_position_has_each_of_its_rows_once_in_any_micro_batches(tmp_path, kinds, place_of_rows):
    samples, rule, candidates = _samples(), SensePositions(1, 0.5, 2), _candidates(kinds)
    drawn = set(candidates.draw(STEP).tolist())
    assert bool(drawn) == ("random" in kinds)
    expected = {}
    for sample in samples:
        relation, own = rule.draw(sample, sample["sample_id"], 1)
        for position in {*relation.tolist(), *own.tolist()}:
            named = {int(row) for kind in kinds if kind in COLUMNS for row in sample[COLUMNS[kind]][position]}
            expected[sample["sample_id"], position] = (named - {-1}) | drawn
    path = None
    if place_of_rows == "in the batch":
        path = tmp_path / "v.safetensors"
        save_file({"vectors": torch.arange(float(ROWS)).unsqueeze(-1).repeat(1, 2).bfloat16()}, path)
    for size in (1, 2, 8):
        found = {}
        for batch in Collator(path, rule, micro_batch_size=size, candidates=candidates)(samples):
            senses, length = batch["senses"], batch["input_ids"].shape[1]
            numbers = torch.arange(ROWS) if path is None else senses["sense_rows"].read()[:, 0].long()
            assert batch["loss_mask"].flatten()[senses["positions"]].all()
            for position, places in zip(senses["positions"].tolist(), senses["candidate_rows"].tolist(), strict=True):
                rows = [int(numbers[place]) for place in places if place >= 0]
                rows += numbers[senses["random_rows"]].tolist()
                assert len(rows) == len(set(rows))
                key = int(batch["sample_ids"][position // length]), position % length
                assert key not in found
                found[key] = set(rows)
        assert found == expected


def test_random_rows_are_a_function_of_seed_and_step_and_come_equally_often():
    candidates = _candidates(number=10)
    assert np.array_equal(candidates.draw(7), _candidates(number=10).draw(7))
    for other in (candidates.draw(8), _candidates(number=10, seed=4).draw(7)):
        assert set(candidates.draw(7)) != set(other)
    counts = np.zeros(ROWS)
    for step in range(2000):
        drawn = candidates.draw(step)
        assert len(set(drawn)) == len(drawn) <= 10
        counts[drawn] += 1
    expected = 2000 * (1 - (1 - 1 / ROWS) ** 10)  # drawn with replacement, counted once
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_no_random_rows_are_drawn_if_none_are_configured_or_none_exist():
    assert len(_candidates(("own",)).draw(STEP)) == 0
    assert len(_candidates(rows=0).draw(STEP)) == 0


def test_lexical_positions_are_those_with_a_synonym_or_antonym():
    samples = _samples()
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert "lexical" not in Collator(None, None, micro_batch_size=2)(samples)[0]
    seen = 0
    for batch in Collator(None, None, micro_batch_size=2, lexical=True)(samples):
        for row, sample_id in zip(batch["lexical"].tolist(), batch["sample_ids"].tolist(), strict=True):
            sample = by_id[sample_id]
            expected = [
                max(*sample["synonym_ids"][position], *sample["antonym_ids"][position]) >= 0
                for position in range(len(row))
            ]
            assert row == expected
            seen += sum(row)
    assert seen
