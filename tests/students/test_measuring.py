"""`dskd student` with layers that are chosen by measuring, and `--explain`, on the command line."""

import itertools
import re

import numpy as np
import pytest
import torch
from layer_angles import plain_angles
from safetensors.torch import load_file
from transformers import AutoConfig

from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.shards.storing_states import plan_stored
from dskd.students.cutting import recipe
from dskd.students.measuring import sample_rows
from dskd.students.spacing import require_chosen_layers
from dskd.students.student import find_student

MEASURED = ("student.spacing=importance", "student.importance_samples=6", "student.layers=2", "student.train_layers=1")
BEFORE = ("corpus", "teacher", "sequences")


def _documents(config):
    """Returns the documents in the sequences that are drawn, as tensors of tokens."""
    tensors = load_file(config.path("sequences", "train.safetensors"))
    documents = []
    for row in sample_rows(len(tensors["lengths"]), 6, config.seed):
        tokens = tensors["input_ids"][row, : tensors["lengths"][row]].long()
        starts = [*tensors["starts"][row, : len(tokens)].nonzero().flatten().tolist(), len(tokens)]
        documents += [tokens[begin:end] for begin, end in itertools.pairwise(starts)]
    return documents


def test_a_student_cut_by_importance_lacks_the_block_that_was_measured_to_change_least(copy_of_tiny, dskd):
    path = copy_of_tiny(*BEFORE)
    config = load_config(path, MEASURED)
    # Held-out text is not read: this is none.
    held_out = config.path("sequences", "validation.safetensors")
    held_out.write_bytes(b"\xff" * held_out.stat().st_size)
    code, _, error = dskd("student", "--config", path, *MEASURED)
    assert code == 0, error
    manifest = read_manifest(config.path("student"), "student")
    facts = manifest.facts["importance"]
    documents = _documents(config)
    assert len(documents) > 6  # packed
    for name, size in (("layers", 1), ("blocks", 2)):
        expected, count = plain_angles(config.path("teacher"), documents, size)
        np.testing.assert_allclose(facts[name], expected, rtol=1e-4)
        assert (facts["samples"], facts["tokens"]) == (6, count)
    # Of two blocks of two layers: the third would take the last layer, which is trained.
    start = int(np.argmin(facts["blocks"][:2]))
    assert manifest.facts["layers"] == [layer for layer in range(4) if not start <= layer < start + 2]
    assert AutoConfig.from_pretrained(config.path("student")).num_hidden_layers == 2

    # The choice is the recorded one: nothing is measured again, and the pipeline finds the student up to date.
    teacher, student = find_teacher(config), find_student(config)
    require_chosen_layers(config, teacher, student)
    assert is_current(config.path("student"), recipe(config, teacher))
    stored = load_config(path, [*MEASURED, "annotation.store=[teacher_states, trunk_states]"])
    if start:
        assert plan_stored(stored, teacher).trunk_depth == start
    for change in ("student.importance_samples=7", "student.layers=3", "seed=9"):
        assert not is_current(config.path("student"), recipe(load_config(path, [*MEASURED, change]), teacher)), change
    for change in ("student.importance_samples=7", "student.layers=3"):
        with pytest.raises(
            UserError, match=r"was not cut from this teacher with student\.spacing: importance.* `dskd st"
        ):
            require_chosen_layers(load_config(path, [*MEASURED, change]), teacher, student)


def test_a_student_with_the_teachers_ends_is_cut_and_stale_when_other_layers_are_trained(copy_of_tiny, dskd):
    path = copy_of_tiny("teacher")
    options = ("student.layers=3", "student.train_layers=2")
    code, _, error = dskd("student", "--config", path, *options)
    assert code == 0, error
    config = load_config(path, options)
    teacher, student = find_teacher(config), find_student(config)
    assert read_manifest(student.path, "student").facts["layers"] == [0, 2, 3]
    whole, cut = (load_file(config.path(name, "model.safetensors")) for name in ("teacher", "student"))
    for new, old in enumerate([0, 2, 3]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(cut[name.format(new)], whole[name.format(old)])
    require_chosen_layers(config, teacher, student)
    assert is_current(student.path, recipe(config, teacher))
    other = load_config(path, ["student.layers=3", "student.train_layers=1"])
    assert not is_current(student.path, recipe(other, teacher))
    with pytest.raises(
        UserError,
        match=r"layers 0, 2, 3, but student\.layers, student\.spacing and student\.train_layers choose 0, 1, 3; cut it",
    ):
        require_chosen_layers(other, teacher, student)


def test_explain_shows_what_each_way_would_keep_and_cuts_nothing(copy_of_tiny, dskd):
    path = copy_of_tiny(*BEFORE)
    work = load_config(path).path()
    before = sorted(work.rglob("*"))
    code, printed, error = dskd("student", "--config", path, "--explain", *MEASURED)
    assert code == 0, error
    picture = work / "plots" / "layers.png"
    assert f"Picture: {picture}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    hashes = work / ".teacher_digests.json"  # so that the teacher's files are hashed once
    assert {*work.rglob("*")} - {*before} <= {picture.parent, picture, hashes}
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line[:1].isdigit()}
    expected, _ = plain_angles(work / "teacher", _documents(load_config(path, MEASURED)), 1)
    assert [float(rows[str(layer)][1]) for layer in range(4)] == pytest.approx(expected.tolist(), abs=6e-5)
    header = next(line for line in printed.splitlines() if line.startswith("layer "))
    assert header.split()[-4:] == ["first", "even", "ends", "importance"]
    kept = [[layer for layer in range(4) if rows[str(layer)][column] == "kept"] for column in (-4, -3, -2)]
    assert kept == [[0, 1], [0, 3], [0, 3]]
    code, printed, error = dskd("student", "--config", path, "--explain", "student.layers=[1, 2, 3]")
    assert code == 0 and "This config chooses your list: the teacher's layers 1, 2, 3." in printed, error


@pytest.mark.parametrize(
    ("artifacts", "options", "message"),
    [
        (("teacher",), MEASURED, "measured on training sequences, but .*/sequences: there are no sequences here; make"),
        (("corpus",), MEASURED, "teacher: there is no teacher here; make it with `python launcher/pipeline.py"),
        (BEFORE, (*MEASURED, "student.layers=4"), "student.layers keeps all of the teacher's 4"),
        (BEFORE, ("student.importance_samples=9",), "student.importance_samples needs spacing: importance"),
    ],
)
@pytest.mark.parametrize("explain", [(), ("--explain",)])
def test_what_cannot_be_measured_is_refused(copy_of_tiny, dskd, artifacts, options, message, explain):
    path = copy_of_tiny(*artifacts)
    code, _, error = dskd("student", "--config", path, *explain, *options)
    assert code == 2
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not load_config(path).path("student").exists()


@pytest.mark.parametrize("options", [(), ("student.spacing=importance",), ("student.spacing=first",)])
def test_explain_names_the_number_of_layers_if_nothing_would_be_removed(copy_of_tiny, dskd, options):
    path = copy_of_tiny(*BEFORE)
    code, _, error = dskd("student", "--config", path, "--explain", "student.layers=4", *options)
    assert code == 2
    message = "student.layers keeps all of the teacher's 4 layers, so nothing would be removed; set student.layers to 3"
    assert f"--explain: {message} or less" in error, error
    assert "student.spacing" not in error


def test_a_student_that_is_not_cut_is_not_explained(copy_of_tiny, dskd):
    path = copy_of_tiny(*BEFORE, student={"from_config": {"layers": 2, "hidden_size": 32, "heads": 2}})
    code, _, error = dskd("student", "--config", path, "--explain")
    assert code == 2
    assert "--explain: student.from_config names a whole model, so no layers are chosen" in error, error


def test_the_sample_is_drawn_once_for_all_runs_and_not_again():
    rows = sample_rows(1000, 64, seed=3)
    assert len(set(rows.tolist())) == 64 and rows.tolist() == sorted(rows.tolist())
    assert rows.tolist() == sample_rows(1000, 64, seed=3).tolist() != sample_rows(1000, 64, seed=4).tolist()
    assert set(rows.tolist()) > set(sample_rows(1000, 32, seed=3).tolist())
    assert sample_rows(5, 64, seed=3).tolist() == [0, 1, 2, 3, 4]
