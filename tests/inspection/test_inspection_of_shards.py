"""`dskd inspect shards` on shards with and without a hash of each sample."""

import re

import numpy as np
import pytest

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.errors import UserError
from dskd.inspection.shards import format_shards, inspect_shards
from dskd.shards import COLUMNS, join_blocks
from dskd.shards.writing import write_block


@pytest.fixture
def config(tmp_path):
    """Makes shards of 3 and 4 samples, with states in training and packed in validation."""
    random = np.random.default_rng(0)
    columns = {name: random.integers(0, 9, (6, 2)).astype(np.int32) for name in COLUMNS if "ids" in name}
    columns |= {"input_ids": np.arange(6, dtype=np.int32), "loss_mask": np.ones(6, np.uint8)}
    columns["document_starts"] = np.zeros(6, np.uint8)
    states = {"trunk_states": random.standard_normal((6, 4)).astype(np.float32)}
    config = Config(workdir=str(tmp_path / "work"), teacher={"path": "x"})
    for split, encodings, options in (
        ("train", COLUMNS | {"trunk_states": "ndarray:float32"}, {"compression": None}),
        ("validation", COLUMNS, {}),
    ):
        blocks = [tmp_path / split / str(number) for number in range(2)]
        for number, block in enumerate(blocks):
            samples = [columns | (states if split == "train" else {})] * (3 + number)
            write_block(block, samples, encodings, **options)
        with build_artifact(config.path("shards", split), Recipe("shards")) as building:
            building.facts["samples"] = join_blocks(building.folder, blocks)
    return config


def _flip(path, place):
    """Changes a bit of the byte at `place`, which may count from the end."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_unchanged_shards_are_reported_with_their_numbers(config):
    text = format_shards(inspect_shards(config))
    assert re.search(
        r"train: 7 samples in 3 files, [1-9]\.\d\d KB: as they .* \(compared 2 sample by sample, 1 as", text
    )
    assert re.search(r"validation: 7 samples in 3 files, [1-9]\.\d\d KB: as they .* \(compared 3 as a whole\)", text)


def test_changed_bytes_are_found_with_their_file_and_sample(config):
    train, validation = config.path("shards", "train"), config.path("shards", "validation")
    first, second = train / "shard.00000.mds", train / "shard.00001.mds"
    packed = validation / "shard.00001.mds.zstd"
    _flip(second, -5)  # the last value of the last sample
    _flip(first, first.read_bytes().index(b"column_names"))
    _flip(packed, -5)
    with pytest.raises(UserError) as raised:
        inspect_shards(config)
    assert str(raised.value).splitlines() == [
        f"{first}: the description of its columns, before its samples, is not what the manifest says",
        f"{second}: its sample 3 (sample_id 6) is not what the index says",
        f"{packed}: the content is not what the manifest says",
        "Restore these files from a copy of the shards. If there is none, remove their folder and make the shards "
        "again with `deepspeed launcher/annotate.py --config FILE`",
    ]


@pytest.mark.parametrize("place", [4, 8, 17])  # the begin of the first sample, its end, and the begin of none
def test_changed_places_of_samples_are_found(config, place):
    path = config.path("shards", "train") / "shard.00000.mds"
    _flip(path, place)
    with pytest.raises(UserError, match=r"shard\.00000\.mds: (the places of its|its sample [01] )"):
        inspect_shards(config)


def test_a_changed_index_is_found_first(config):
    _flip(config.path("shards", "train") / "index.json", -9)
    with pytest.raises(UserError, match=r"train/index\.json: the content is not what the manifest says, so"):
        inspect_shards(config)
