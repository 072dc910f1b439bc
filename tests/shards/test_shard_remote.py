"""Shards that are read from a remote copy (train.shard_remote); test_pods.py reads them from a real object store."""

import shutil

import numpy as np
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from config_files import MINIMAL, write_config
from rank_processes import ONE_RANK

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.shards import COLUMNS, is_lasting, join_blocks, load_manifest, open_shards, require_fitting
from dskd.shards.writing import write_block


def _sample(number):
    columns = {name: np.dtype(encoding.removeprefix("ndarray:")) for name, encoding in COLUMNS.items()}
    return {name: np.full((4, 2) if name.endswith("_ids") else 4, number, kind) for name, kind in columns.items()}


@pytest.fixture
def copied(tmp_path):
    """(config, its remote copy of 6 samples in 3 shards); the work directory has only the manifest."""
    config = Config(
        workdir=str(tmp_path / "work"), teacher={"path": "x"}, train={"shard_remote": str(tmp_path / "far")}
    )
    folder = config.path("shards", "train")
    blocks = []
    for number in range(3):
        blocks.append(tmp_path / f"block-{number}")
        write_block(blocks[-1], map(_sample, range(2 * number, 2 * number + 2)))
    with build_artifact(folder, Recipe("shards", {"senses": "s"}, {}, "t", "k")) as building:
        join_blocks(building.folder, blocks)
    shutil.copytree(folder, tmp_path / "far" / "train")
    for file in folder.iterdir():
        if file.name != "manifest.json":
            file.unlink()
    return config, tmp_path / "far" / "train"


def _read(config, cache):
    dataset = open_shards(config, "train", cache, ONE_RANK, batch_size=1)
    return [int(dataset[i]["input_ids"].flat[0]) for i in range(len(dataset))]


def test_samples_come_from_the_remote_copy_and_only_the_manifest_must_be_local(copied, tmp_path):
    config, _ = copied
    require_fitting(config, "train", load_manifest(config, "train"), senses="s", teacher="t", tokenizer="k")
    assert _read(config, tmp_path / "cache") == list(range(6))


def test_without_a_remote_copy_the_shards_must_be_local(copied):
    config, _ = copied
    here = config.model_copy(update={"train": config.train.model_copy(update={"shard_remote": None})})
    with pytest.raises(UserError, match="it is missing"):
        load_manifest(here, "train")


def test_shards_that_do_not_fit_are_refused_with_a_remote_copy_too(copied):
    config, _ = copied
    with pytest.raises(UserError, match="made with different sense dictionaries"):
        require_fitting(config, "train", load_manifest(config, "train"), senses="o", teacher="t", tokenizer="k")


def test_a_copy_of_other_shards_is_refused(copied, tmp_path):
    config, remote = copied
    index = remote / "index.json"
    index.write_text(index.read_text().replace('"version": 2', '"version":  2'))
    with pytest.raises(UserError, match=r"far/train: its index\.json is not that of .+work/shards/train"):
        open_shards(config, "train", tmp_path / "cache", ONE_RANK, batch_size=1)


def test_a_shard_that_was_changed_in_the_remote_copy_is_not_read(copied, tmp_path):
    config, remote = copied
    shard = sorted(remote.glob("*.mds.zstd"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Exception, match=r"[Cc]hecksum"):
        _read(config, tmp_path / "cache")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("no such file"), True),
        (ValueError("Checksum failure"), True),
        (ClientError({"Error": {"Code": "404"}}, "GetObject"), True),
        (NoCredentialsError(), True),
        (ClientError({"Error": {"Code": "SlowDown"}}, "GetObject"), False),
        (EndpointConnectionError(endpoint_url="http://store"), False),
        (TimeoutError("timed out"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_errors_that_a_retry_would_repeat_are_lasting(error, expected):
    assert is_lasting(error) == expected


@pytest.mark.parametrize("place", ["bucket/shards", "s3:bucket", "s3://"])
def test_an_address_of_no_remote_folder_is_refused_with_the_right_form(tmp_path, place):
    write_config(tmp_path / "config.yaml", MINIMAL)
    with pytest.raises(UserError, match=r"is not a remote folder; give SCHEME://BUCKET/FOLDER"):
        load_config(tmp_path / "config.yaml", [f"train.shard_remote='{place}'"])
