"""The states of the teacher in the shards, against transformers' own, and when they are refused or out of date."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, save_architecture
from artifact_folders import open_dataset
from plain_reading import run_apart
from pydantic import ValidationError
from rank_processes import run_program
from stages import build_sequences_of
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.artifacts.building import Building
from dskd.artifacts.hashing import hash_files
from dskd.artifacts.manifest import Manifest, Recipe, is_current, read_manifest
from dskd.artifacts.mds import INDEX, read_index, read_samples
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.corpus.sequences import Sequences, TokenBatch
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import load_frozen
from dskd.shards import COLUMNS, TEACHER_COLUMNS, StoredStates, digest_without_states, open_shards
from dskd.shards.annotate import annotate
from dskd.shards.recipe import open_inputs, recipe
from dskd.shards.storing_states import (
    columns_of_states,
    describe_stored,
    plan_stored,
    require_space,
    require_unchanged_input,
    stored_bytes,
)

BOTH = ("teacher_states", "trunk_states")
STORE = f"annotation.store=[{', '.join(BOTH)}]"
FEW = ["corpus.max_sequences=24", "corpus.max_validation_sequences=4"]
T, D = 32, 64


def _samples(config, cache, split="train"):
    dataset = open_dataset(config.path("shards", split), cache)
    return [dataset[index] for index in range(len(dataset))]


def _states(sample, column):
    """Stored states [T', D] as the floats that they are."""
    stored = torch.from_numpy(sample[column].copy())
    return stored if stored.dtype == torch.float32 else stored.view(torch.bfloat16).float()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-4), ("bf16", 0.08)])
def test_the_stored_states_are_those_of_transformers(copy_of_tiny, world, tmp_path, precision, apart):
    """The last states, and those that enter layer 2 of a student whose layers 0 and 1 are frozen, by document."""
    options = [STORE, f"precision={precision}", "student.layers=3", "annotation.teacher_top_n=0"]
    config = load_config(copy_of_tiny("corpus", "lexicon", "teacher", "senses"), [*options, *FEW])
    build_sequences_of(config)
    annotate(config, world)
    manifest = read_manifest(config.path("shards", "train"), "shards")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    facts = {"columns": [*BOTH], "dtype": dtype, "hidden_size": D, "trunk_depth": 2, "trunk_layers": [0, 1]}
    assert manifest.facts["stored"] == facts
    assert StoredStates.of(manifest) == StoredStates(BOTH, dtype, D, 2)
    source = find_teacher(config).path
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    end = AutoTokenizer.from_pretrained(source).eos_token_id
    samples = _samples(config, tmp_path / "cache")
    assert len(samples) == 24
    for sample in samples:
        assert set(sample) == set(COLUMNS) | set(BOTH)
        length = int(sample["loss_mask"].nonzero()[0].max()) + 1
        ids = torch.tensor(sample["input_ids"]).long().unsqueeze(0)
        for column, depth in zip(BOTH, (-1, 2), strict=True):
            assert sample[column].dtype == (np.float32 if precision == "fp32" else np.uint16)
            found = _states(sample, column)
            assert found.shape == (length, D)
            with torch.no_grad():
                _, expected, _ = run_apart(teacher, ids, end, depth)
            has_target = torch.from_numpy(sample["loss_mask"][:length] > 0)
            if column == "teacher_states":
                assert not found[~has_target].any()
            else:
                has_target[:] = True
            difference = (found - expected[:length].float())[has_target]
            assert difference.norm() < apart * expected[:length].float()[has_target].norm()
    # Held-out text is read with the teacher itself.
    assert set(_samples(config, tmp_path / "held-out", "validation")[0]) == set(COLUMNS)
    assert "stored" not in read_manifest(config.path("shards", "validation"), "shards").facts
    # Other readers of the shards see the same columns.
    for read, sample in zip(read_samples(config.path("shards", "train") / INDEX), samples, strict=True):
        assert all(np.array_equal(read[name], column) for name, column in sample.items())


@pytest.mark.slow
def test_one_rank_stores_the_same_states_as_two_byte_for_byte(copy_of_tiny, world, tmp_path):
    path = copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses", "shards")
    folder = load_config(path).path("shards", "train")
    contents = []
    for annotate_on in (
        lambda: annotate(load_config(path, [STORE]), world),
        lambda: run_program("annotate.py", path, STORE, ranks=2),
    ):
        shutil.rmtree(folder)
        annotate_on()
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
        # The hashes that were taken while the files were written are those of the files.
        assert read_manifest(folder, "shards").files == hash_files(folder)
    assert contents[0] == contents[1]
    assert {Path(name).suffix for name in contents[0]} == {".mds", ".json"}  # not compressed
    shards = json.loads(contents[0][INDEX])["shards"]
    assert sum(shard["samples"] for shard in shards) == 96


@pytest.mark.slow
def test_shards_have_the_digest_of_those_without_states_whatever_is_stored(copy_of_tiny, world, monkeypatch):
    """The order of samples is the same, too, although a file has fewer of them."""
    monkeypatch.setattr("dskd.shards.blocks.LARGEST_SHARD", 40_000)  # two samples
    path = copy_of_tiny("corpus", "teacher", "sequences", "senses", "shards")
    found, orders, sizes = [], [], []
    for number, options in enumerate([[], [STORE, "student.layers=3"], ["annotation.store=[teacher_states]"]]):
        config = load_config(path, [*options, "precision=fp32"])
        annotate(config, world)
        manifest = read_manifest(config.path("shards", "train"), "shards")
        found.append(digest_without_states(manifest))
        if not number:
            assert found == [manifest.digest]
        sizes.append({shard["samples"] for shard in read_index(config.path("shards", "train") / INDEX)})
        dataset = open_shards(
            config, "train", path.parent / f"cache-{number}", world, shuffle=True, shuffle_seed=1, batch_size=1,
            num_canonical_nodes=1, epoch_size=90,
        )  # fmt: skip
        orders.append([[sample["sample_id"] for sample in dataset] for _ in range(2)])
    assert len(set(found)) == 1
    assert sizes[:2] == [{6}, {2}]
    assert orders[0][0] != orders[0][1]
    assert orders[1:] == orders[:1] * 2
    annotate(load_config(path, [STORE, "annotation.kappa=1"]), world)
    assert digest_without_states(read_manifest(config.path("shards", "train"), "shards")) != found[0]


@pytest.mark.slow
def test_states_are_those_of_the_continued_texts_without_their_padding(copy_of_tiny, world, tmp_path):
    path = copy_of_tiny("corpus", "teacher", "senses")
    options = [STORE, "corpus.packing=none", "annotation.continuation_tokens=5", *FEW]
    config = load_config(path, options)
    build_sequences_of(config)
    annotate(config, world)
    teacher = AutoModelForCausalLM.from_pretrained(find_teacher(config).path, dtype=torch.float32)
    assert read_manifest(config.path("shards", "train"), "shards").facts["continued_tokens"] > 10
    lengths = set()
    for sample in _samples(config, tmp_path / "cache"):
        assert set(sample) == set(COLUMNS) | set(TEACHER_COLUMNS) | set(BOTH)
        length = int(sample["loss_mask"].sum())
        with torch.no_grad():
            ids = torch.tensor(sample["input_ids"][: length + 1]).long().unsqueeze(0)
            states = teacher(ids, output_hidden_states=True).hidden_states
        for column, depth in zip(BOTH, (-1, 1), strict=True):
            torch.testing.assert_close(_states(sample, column), states[depth][0, :length], rtol=1e-4, atol=1e-4)
        lengths.add(length)
    assert len(lengths) > 5


def test_states_lose_no_bit_and_positions_without_a_target_are_zero():
    has_target = torch.tensor([[True, False, True, False], [True, True, True, False], [False] * 4])
    batch = TokenBatch(torch.zeros(3, 4).long(), None, has_target, torch.zeros(3, 4).byte(), 9)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 5, generator=generator).bfloat16()
    states[0, 1] = torch.nan  # nothing reads a position without a target
    columns = columns_of_states(batch, {"teacher_states": states, "trunk_states": states}, "bfloat16")
    assert [len(rows) for rows in columns["teacher_states"]] == [len(rows) for rows in columns["trunk_states"]]
    assert [rows.shape for rows in columns["trunk_states"]] == [(3, 5), (3, 5), (1, 5)]
    for row, (last, trunk) in enumerate(zip(*columns.values(), strict=True)):
        bits = states[row].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(trunk, bits[: len(trunk)])
        target = has_target[row, : len(last)].numpy()
        assert np.array_equal(last[target], bits[: len(last)][target])
        assert not last[~target].any()
    with pytest.raises(UserError, match="are of type bfloat16, and the type to compute in is float32"):
        columns_of_states(batch, {"trunk_states": states}, "float32")


@pytest.mark.slow
def test_shards_without_stored_states_stay_up_to_date(copy_of_tiny):
    """Those that were written before the keys existed, and those of another student that shares the same layers."""
    path = copy_of_tiny("corpus", "teacher", "sequences", "senses", "shards")

    def recipe_of(*options, split="train"):
        config = load_config(path, options)
        return recipe(config, split, open_inputs(config, find_teacher(config)))

    shards = load_config(path).path("shards", "train")
    assert is_current(shards, recipe_of())
    assert not {"store", "trunk_depth"} & set(recipe_of().config)
    assert not is_current(shards, recipe_of(STORE))
    assert recipe_of(split="validation") == recipe_of(STORE, split="validation")
    stored = recipe_of(STORE, "student.layers=3")
    assert (stored.config["store"], stored.config["trunk_depth"]) == ([*BOTH], 2)
    assert stored == recipe_of(STORE, "student.layers=4", "student.train_layers=2")
    assert stored != recipe_of(STORE, "student.layers=3", "student.train_layers=2")
    # The last states do not depend on the student.
    last = "annotation.store=[teacher_states]"
    assert recipe_of(last) == recipe_of(last, "student.layers=3", "student.shared_trunk=off")


def _config(folder, store=BOTH, sequence_length=T, **student):
    return Config(
        workdir=str(folder / "work"),
        precision="fp32",
        teacher={"path": str(folder / "teacher"), "offload": "none"},
        corpus={"sequence_length": sequence_length},
        annotation={"store": store},
        student={"layers": 3, "train_layers": 1, **student},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_layers": 3}, "the student's lowest layer is trained"),
        ({"shared_trunk": "off"}, "student.shared_trunk is off"),
        ({"train_embeddings": True}, "the student's embeddings are trained"),
        ({"layers": (1, 2)}, "lowest layer is the teacher's layer 1"),
        ({"layers": 9}, "student.layers: the teacher has 4 layers"),
    ],
)
def test_states_that_cannot_be_stored_are_refused_before_work_begins(tmp_path, options, message):
    save_model(tmp_path / "teacher")
    # By the config if its keys show it, otherwise by annotation, which knows the teacher.
    with pytest.raises((ValidationError, UserError), match=message):
        plan_stored(config := _config(tmp_path, **options), find_teacher(config))
    # The last states do not depend on the student.
    config = _config(tmp_path, ("teacher_states",), **options)
    assert plan_stored(config, find_teacher(config)) == StoredStates(("teacher_states",), "float32", 32, 0)


def test_a_disk_without_room_for_the_states_is_refused(tmp_path, monkeypatch):
    sequences = Sequences(tmp_path, np.array([32, 30, 2]), 32)
    stored = StoredStates(BOTH, "bfloat16", 64, 2)
    size = stored_bytes(stored, sequences, 1)
    assert size == (32 + 31 + 3) * 64 * 2 * 2
    line = describe_stored(stored, 3 * 2**30, tmp_path)
    assert line == f"stores teacher_states and trunk_states (what enters layer 2) in bf16: 3.00 GB in {tmp_path}"
    assert f"{size / 2**20:.2f} MB in {tmp_path}" in describe_stored(stored, size, tmp_path)
    building = Building(tmp_path / "shards" / "train", Recipe("shards"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * 2**30))
    require_space(2 * 2**30, building)
    message = r"/shards: not enough disk space for the states .*: 2\.01 GB are needed, but only 2\.00 GB are free"
    with pytest.raises(UserError, match=message):
        require_space(2 * 2**30 + 10_000_000, building)
    # What an interrupted annotation has written is not needed again.
    block = building.folder / ".blocks" / "000000000000"
    block.mkdir(parents=True)
    with (block / "shard.00000.mds").open("wb") as file:
        file.truncate(10_000_000)
    require_space(2 * 2**30 + 10_000_000, building)


def test_a_manifest_of_another_version_says_what_it_lacks():
    facts = {"columns": [*BOTH], "dtype": "float32", "hidden_size": 8, "trunk_depth": 2, "of_tomorrow": 1}
    manifest = Manifest("shards", 1, {}, {}, None, None, {}, {"stored": facts}, {})
    assert StoredStates.of(manifest) == StoredStates(BOTH, "float32", 8, 2)
    facts["trunk_layers"] = [0, 1]
    assert StoredStates.of(manifest) == StoredStates(BOTH, "float32", 8, 2)
    facts["trunk_layers"] = [0, 2]
    with pytest.raises(UserError, match=r"layers \[0, 2\] computed .*make the shards again with `deepspeed"):
        StoredStates.of(manifest)
    facts["trunk_layers"] = [0, 1]
    del facts["dtype"]
    with pytest.raises(UserError, match=r"KeyError\('dtype'\) in facts.stored"):
        StoredStates.of(manifest)


def test_a_sample_that_no_shard_can_hold_is_refused(tmp_path):
    save_model(tmp_path / "teacher")
    settings = tmp_path / "teacher" / "config.json"
    settings.write_text(
        settings.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 9e7')
    )
    config = _config(tmp_path, sequence_length=2**25)
    with pytest.raises(
        UserError, match=r"a sequence of 33,554,432 tokens has 10\.\d\d GB, and a sample can have 2\.00 GB"
    ):
        plan_stored(config, find_teacher(config))


def test_layers_whose_shape_depends_on_their_place_have_no_trunk_to_store(tmp_path):
    save_architecture(tmp_path / "teacher", "diffllama")
    config = _config(tmp_path)
    with pytest.raises(UserError, match="a layer's shape depends on its place"):
        plan_stored(config, find_teacher(config))


@pytest.mark.parametrize(("architecture", "changes"), [("llama", False), ("gemma", True), ("gpt2", True)])
def test_an_architecture_that_changes_the_states_that_enter_is_refused(tmp_path, world, architecture, changes):
    assert architecture in ARCHITECTURES
    save_architecture(tmp_path / "teacher", architecture)
    config = _config(tmp_path)
    teacher = load_frozen(find_teacher(config), config, world, with_head=False)
    if changes:
        with pytest.raises(UserError, match="changes the states that go into its lowest layer"):
            require_unchanged_input(teacher, world)
    else:
        require_unchanged_input(teacher, world)
    teacher.close()
