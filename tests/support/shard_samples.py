"""Samples as the shards have them, with random rows of a dictionary of 60."""

import numpy as np

T, K = 20, 2


def make_sample(seed=0, sample_id=4, epoch=0):
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


def make_ragged(real_lengths):
    """Samples as `packing: none` makes them: some tokens, then padding, with rows of all kinds in the padding too."""
    samples = []
    for number, real in enumerate(real_lengths):
        sample = make_sample(number, sample_id=100 + number)
        sample["loss_mask"] = (np.arange(T) < real - 1).astype(np.uint8)
        samples.append(sample)
    return samples
