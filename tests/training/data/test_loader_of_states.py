"""The loader on shards with stored states: they reach the step bit for bit, and changed files are refused."""

import errno
import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_folders import update_manifest
from loaded_steps import ROWS, SAMPLES, SCHEDULE, K, T, config_of, steps_of
from rank_processes import ONE_RANK

from dskd import shards
from dskd.artifacts.building import build_artifact
from dskd.artifacts.hashing import hash_files
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.errors import OutageError, UserError
from dskd.shards import COLUMNS, join_blocks
from dskd.shards.sample_files import SampleReader
from dskd.shards.writing import write_block
from dskd.training.data.collator import Collator
from dskd.training.data.loader import Unreadable, load_steps

STATES = {"teacher_states": torch.bfloat16, "trunk_states": torch.float32}


@pytest.fixture(scope="module")
def with_states(tmp_path_factory):
    """Makes a work directory whose shards are not packed, and have states up to each sample's last target."""
    folder = tmp_path_factory.mktemp("states")
    random = np.random.default_rng(1)
    samples = []
    for _ in range(SAMPLES):
        length = int(random.integers(0, T + 1))
        rows = max(1, length)  # a sample without a target has one row
        columns = {name: random.integers(0, ROWS, (T, K)).astype(np.int32) for name in COLUMNS if "ids" in name}
        columns["input_ids"] = random.integers(0, 99, T).astype(np.int32)
        columns["loss_mask"] = (np.arange(T) < length).astype(np.uint8)
        columns["document_starts"] = (np.arange(T) == 0).astype(np.uint8)
        columns["teacher_states"] = random.integers(0, 2**15, (rows, 4)).astype(np.uint16)
        columns["trunk_states"] = random.standard_normal((rows, 4)).astype(np.float32)
        samples.append(columns)
    assert any(not sample["loss_mask"].any() for sample in samples)
    encodings = {**COLUMNS, "teacher_states": "ndarray:uint16", "trunk_states": "ndarray:float32"}
    blocks = [folder / "blocks" / str(number) for number in range(3)]
    for number, block in enumerate(blocks):
        write_block(block, iter(samples[number::3]), encodings, compression=None)
    with build_artifact(folder / "shards" / "train", Recipe("shards")) as building:
        join_blocks(building.folder, blocks)
    return folder, [sample for number in range(3) for sample in samples[number::3]]


# Three workers do not divide the steps of an epoch evenly, and the 7th step is within an epoch.
@pytest.mark.parametrize(("workers", "start"), [(0, 0), (1, 0), (3, 0), (2, 7)])
@pytest.mark.parametrize("states", [STATES, {"trunk_states": torch.float32}], ids=["both", "one column of two"])
def test_stored_states_reach_the_step_bit_for_bit_with_zeros_after_them(with_states, tmp_path, workers, start, states):
    folder, samples = with_states
    collate = Collator(None, None, micro_batch_size=2, states=states)
    # All steps are kept, so a step whose memory a later one used would be found.
    steps = list(steps_of(folder, tmp_path / "cache", workers, start, collate=collate))
    assert len(steps) == SCHEDULE.total_steps - start
    for step in steps:
        for batch in step.micro_batches:
            length = batch["input_ids"].shape[1]
            assert batch.keys() - states.keys() == {"input_ids", "labels", "loss_mask", "sample_ids"}
            for row, sample_id in enumerate(batch["sample_ids"].tolist()):
                assert np.array_equal(batch["input_ids"][row].numpy(), samples[sample_id]["input_ids"][:length])
                for column, dtype in states.items():
                    assert batch[column].dtype == dtype
                    assert batch[column].shape == (2, length, 4)
                    stored = samples[sample_id][column]
                    found = batch[column][row].view(torch.uint8).numpy()
                    assert found[: len(stored)].tobytes() == stored.tobytes()
                    assert not found[len(stored) :].any()
    assert not (tmp_path / "cache" / "train").exists()  # read where they are


def test_states_are_compared_where_they_are_used(with_states, tmp_path):
    """A file that was replaced after a worker compared it."""
    folder, samples = with_states
    shutil.copytree(folder / "shards", tmp_path / "shards")
    dataset = shards.open_shards(config_of(tmp_path), "train", tmp_path / "cache", ONE_RANK, batch_size=1)
    place = dataset[3]["in_file"]
    stored = samples[3]["teacher_states"].reshape(-1).view(np.uint8)
    reader = SampleReader()
    for size in (len(stored) - 5, len(stored) + 9):  # a batch can be longer, and shorter than an old shard's rows
        target = np.full(size, 7, np.uint8)
        reader.read_states(place, {"teacher_states": target})
        assert target.tobytes() == stored.tobytes()[:size].ljust(size, b"\0")
    new = bytearray(Path(place.file).read_bytes())
    new[place.start + place.size - 1] ^= 1  # in the other column
    Path(place.file).unlink()
    Path(place.file).write_bytes(new)
    with pytest.raises(ValueError, match=r"shard\.00000\.mds has changed: its sample 3 is not what the index says"):
        SampleReader().read_states(place, {"teacher_states": target})
    os.truncate(place.file, place.start + 9)
    with pytest.raises(ValueError, match=r"shard\.00000\.mds has [\d,]+ bytes, but the index says [\d,]+"):
        SampleReader().read_states(place, {"teacher_states": target})


def test_a_file_that_changes_after_a_worker_read_it_stops_training_without_a_traceback(with_states, tmp_path):
    folder, _ = with_states
    shutil.copytree(folder / "shards", tmp_path / "shards")
    collate = Collator(None, None, micro_batch_size=2, states=STATES)

    def change_files(samples):
        for sample in samples:
            file = Path(sample["in_file"].file)
            changed = file.with_suffix(".changed")
            changed.write_bytes(file.read_bytes()[:-1] + b"?")
            changed.replace(file)  # the worker has mapped the old file, and the rank finds no half-written one
        return collate(samples)

    message = (
        r"train: a shard of the training data cannot be read \(ValueError: \S+/shard\.\d+\.mds has changed: its sample"
    )
    with pytest.raises(UserError, match=message):
        list(steps_of(tmp_path, tmp_path / "cache", 1, collate=change_files))


@pytest.mark.parametrize("num_read", [3, 40], ids=["by a worker", "by the rank"])
def test_a_shard_that_becomes_shorter_during_training_is_named_with_what_to_do(with_states, tmp_path, num_read):
    """Reading past the end of a mapped file is a bus error, which would end the process without a message."""
    folder, _ = with_states
    shutil.copytree(folder / "shards", tmp_path / "shards")
    collator = Collator(None, None, micro_batch_size=2, states=STATES)
    seen = []

    def shorten_files(samples):
        batches = collator(samples)  # after a worker has read these samples, and before the rank reads their states
        seen.extend(samples)
        if len(seen) >= num_read:
            for file in (tmp_path / "shards" / "train").glob("*.mds"):
                os.truncate(file, 100)
        return batches

    message = (
        r"ValueError: \S+/shard\.\d+\.mds has 100 bytes, but the index says [\d,]+\); restore the file, or your access "
        rf"to it, and continue with --resume\. If there is no copy of it, remove {tmp_path}/shards/train and make the "
        r"shards again with `deepspeed launcher/annotate\.py --config FILE`"
    )
    with pytest.raises(UserError, match=message):
        list(steps_of(tmp_path, tmp_path / "cache", 1, collate=shorten_files))


def test_a_worker_that_dies_of_a_shortened_shard_names_it(with_states, tmp_path):
    """The file becomes shorter between the comparison of its size and the copy."""
    folder, _ = with_states
    shutil.copytree(folder / "shards", tmp_path / "shards")
    collator = Collator(None, None, micro_batch_size=2, states=STATES)

    def shorten_files(samples):
        for file in (tmp_path / "shards" / "train").glob("*.mds"):
            os.truncate(file, 100)
        # A map of its own, because the files here are smaller than a page, whose rest reads as zeros.
        mapped = np.memmap(tmp_path / "shards" / "train" / "shard.00000.mds", np.uint8, "r", shape=100)
        os.truncate(tmp_path / "shards" / "train" / "shard.00000.mds", 0)
        assert mapped[0] >= 0
        return collator(samples)

    with pytest.raises(
        UserError, match=r"shard\.00000\.mds has 0 bytes, but the index says [\d,]+\); restore the file"
    ):
        list(steps_of(tmp_path, tmp_path / "cache", 1, collate=shorten_files))


def test_shards_that_are_not_packed_are_copied_only_to_a_cache_that_the_config_names(with_states, tmp_path):
    folder, _ = with_states
    config = config_of(folder)
    train = config.train.model_copy(update={"shard_cache": str(tmp_path)})
    config = config.model_copy(update={"train": train})
    collate = Collator(None, None, micro_batch_size=2, states=STATES)
    steps = load_steps(config, SCHEDULE, collate, tmp_path / "cache", ONE_RANK, start_step=0)
    assert len(list(steps)) == SCHEDULE.total_steps
    assert len(list((tmp_path / "cache" / "train").glob("*.mds"))) == 3


def test_a_cache_without_room_for_the_shards_is_named(with_states, tmp_path, monkeypatch):
    folder, _ = with_states
    config = config_of(folder)
    config = config.model_copy(update={"train": config.train.model_copy(update={"shard_cache": str(tmp_path)})})
    copy = shutil.copy

    def copy_until_full(source, target, **options):
        if "shard.00002" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copy", copy_until_full)
    collate = Collator(None, None, micro_batch_size=2, states=STATES)
    message = r"train\.shard_cache: the disk is full to which .* (MB|GB) or more \(.*No space.*set it to a folder with"
    with pytest.raises(OutageError, match=message):
        list(load_steps(config, SCHEDULE, collate, tmp_path / "cache", ONE_RANK, start_step=0))


def test_a_remote_copy_that_is_damaged_is_made_again_if_there_is_no_other(with_states, tmp_path):
    folder, _ = with_states
    config = config_of(folder)
    remote = config.train.model_copy(update={"shard_remote": str(folder / "shards")})
    bare = config.model_copy(update={"train": remote, "workdir": str(tmp_path)})
    error = FileNotFoundError("gone")
    assert "dskd inspect shards" in Unreadable.of(error, bare.model_copy(update={"workdir": str(folder)})).message
    assert "make the shards again with `deepspeed" in Unreadable.of(error, bare).message


def test_any_number_of_shards_is_read_with_few_open_files(with_states, tmp_path, monkeypatch):
    folder, samples = with_states
    monkeypatch.setattr("dskd.shards.sample_files._OPEN_FILES", 1)
    dataset = shards.open_shards(config_of(folder), "train", tmp_path, ONE_RANK, batch_size=1)
    read = [dataset[index] for index in (0, 20, 40, 1, 21)]
    for index, sample in zip((0, 20, 40, 1, 21), read, strict=True):
        assert np.array_equal(sample["trunk_states"], samples[index]["trunk_states"])
        assert not sample["trunk_states"].flags.writeable
    del read, sample
    gc.collect()
    mapped_now = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".mds" in line}
    assert len([name for name in mapped_now if name.startswith(str(folder))]) == 1


def test_a_shard_that_was_cut_short_is_reported_and_not_read(with_states, tmp_path):
    folder, _ = with_states
    copied = tmp_path / "work"
    shutil.copytree(folder / "shards", copied / "shards")
    for file in (copied / "shards" / "train").glob("*.mds"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"shard\.00000\.mds: the manifest says \d+ bytes, but it has \d+"):
        list(steps_of(copied, tmp_path / "cache", 1))


def _flip(folder, shard, place):
    """Changes one byte of a shard file, at a share of its length; its size stays the same."""
    file = folder / "shards" / "train" / f"shard.{shard:05d}.mds"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("remote", [False, True], ids=["in place", "remote copy"])
def test_a_changed_byte_of_stored_states_stops_training_and_names_the_shard(with_states, tmp_path, workers, remote):
    folder, _ = with_states
    work, far = tmp_path / "work", tmp_path / "far"
    shutil.copytree(folder / "shards", work / "shards")
    config = config_of(work, workers)
    if remote:
        with build_artifact(tmp_path / "new", Recipe("shards", {}, {}, "t", "k")) as building:
            for file in (work / "shards" / "train").glob("[!.]*"):
                shutil.copyfile(file, building.folder / file.name)
        shutil.copyfile(tmp_path / "new" / "manifest.json", work / "shards" / "train" / "manifest.json")
        shutil.copytree(work / "shards", far)
        train = config.train.model_copy(update={"shard_remote": str(far)})
        config = config.model_copy(update={"train": train})
        (tmp_path / "shards").symlink_to(far)
    _flip(tmp_path if remote else work, 1, 0.6)
    steps = load_steps(
        config, SCHEDULE, Collator(None, None, micro_batch_size=2), tmp_path / "c", ONE_RANK, start_step=0
    )
    message = (
        r"cannot be read \(ValueError: \S+/shard\.00001\.mds has changed: its sample \d+ is not what the index says\)"
    )
    again = "has the same files, and `dskd inspect" if remote else "and make the shards again with `deepspeed"
    with pytest.raises(UserError, match=rf"{message}; restore the file.* {work}/shards/train {again}"):
        list(steps)


def test_changed_places_of_samples_are_found(with_states, tmp_path):
    folder, _ = with_states
    shutil.copytree(folder / "shards", tmp_path / "shards")
    file = tmp_path / "shards" / "train" / "shard.00000.mds"
    content = bytearray(file.read_bytes())
    content[8] ^= 64  # the end of the first sample, the begin of the second
    file.write_bytes(content)
    dataset = shards.open_shards(config_of(tmp_path), "train", tmp_path / "cache", ONE_RANK, batch_size=1)
    for index in (0, 1):
        with pytest.raises(ValueError, match=rf"shard\.00000\.mds has changed: its sample {index} is"):
            dataset[index]
    assert dataset[2]["sample_id"] == 2


def test_at_the_start_only_the_index_and_the_sizes_of_stored_states_are_compared(with_states, tmp_path):
    folder, _ = with_states
    config = Config(workdir=str(tmp_path), teacher={"path": "x"})
    target = config.path("shards", "train")
    with build_artifact(target, Recipe("shards", {"senses": "s"}, {}, "t", "k")) as building:
        for file in (folder / "shards" / "train").glob("[!.]*"):
            shutil.copyfile(file, building.folder / file.name)

    def start():
        manifest = shards.load_manifest(config, "train")
        shards.require_fitting(config, "train", manifest, senses="s", teacher="t", tokenizer="k")

    start()
    _flip(tmp_path, 1, 0.6)
    start()  # found when the sample is read
    index = target / "index.json"
    written = index.read_text()
    for old, new in (('"version": 2', '"version": 3'), ('"mds"', '"mdt"'), ("{", "[")):
        index.write_text(written.replace(old, new, 1))
        with pytest.raises(UserError, match=r"index\.json: the content is not what the manifest says.* make it again"):
            start()
    index.write_text(written)
    # An index without the hashes of samples, as of shards that were made before: all files are read.
    manifest = shards.load_manifest(config, "train")
    index.write_text(written.replace("xxh3_64_of_samples", "xxh3_64_of_nothing"))
    update_manifest(target, files={**manifest.files, **hash_files(target, only={"index.json": {}})})
    with pytest.raises(UserError, match=r"shard\.00001\.mds: the content is not what the manifest says"):
        start()
    os.truncate(target / "shard.00002.mds", 99)
    with pytest.raises(UserError, match=r"shard\.00002\.mds: the manifest says \d+ bytes, but it has 99 bytes; it was"):
        start()
    (target / "shard.00002.mds").unlink()
    with pytest.raises(UserError, match=r"shard\.00002\.mds: the manifest says \d+ bytes, but it is missing"):
        start()
