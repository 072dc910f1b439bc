"""Training from states that annotation stored: the same run as with a loaded teacher, and what is refused."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from artifact_folders import update_manifest
from rank_processes import run_program
from safetensors.torch import load_file
from tiny_work import BEFORE_TRAINING, TINY
from tracked_results import losses_of

from dskd.artifacts import kinds
from dskd.artifacts.mds import INDEX, read_samples
from dskd.config.reading import load_config
from dskd.corpus.sequences import build_sequences
from dskd.errors import UserError
from dskd.models.cutting import build_student
from dskd.models.folder import find_teacher
from dskd.shards.annotate import annotate
from dskd.tracking import read_history, read_runs
from dskd.training import checkpoint, inputs
from dskd.training.export import build_export
from dskd.training.status import report_status
from dskd.training.teacher_source import TeacherSource
from dskd.training.train import train

pytestmark = pytest.mark.slow

BOTH = ["teacher_states", "trunk_states"]
# Sequences of one length, and batches of one size: what a kernel computes for a position is the same in both passes.
SETTINGS = {**TINY["train"], "micro_batch_size": 2, "steps": 4, "checkpoint_every": 2, "num_workers": 0}
STUDENT = {"layers": 3, "train_layers": 1}
DISTRIBUTION = {"hidden_weight": 2.0, "sense_form": "distribution", "sense_random_candidates": 20, "min_relations": 3}
TERMS = ("loss", "ce", "kl", "sense", "grad_norm")


@pytest.fixture
def stored(copy_of_tiny, world):
    """Writes a config of a work directory whose shards have states, up to training."""

    def make(store=BOTH, **changes):
        changes = {"student": STUDENT, "train": SETTINGS, **changes}
        annotation = {**TINY["annotation"], "batch_size": 2, "teacher_top_n": 0, "store": store}
        kept = [name for name in BEFORE_TRAINING if name not in ("shards", "student")]
        path = copy_of_tiny(*kept, annotation=annotation, **changes)
        config = load_config(path)
        build_student(config)
        annotate(config, world)
        return path

    return make


def _results(path, world, *overrides, run):
    """Trains and exports a run, and returns its losses, trained tensors and the weights of its export."""
    config = load_config(path, [f"run={run}", *overrides])
    train(config, world)
    build_export(config)
    return _losses(path, run), _trained(config), (config.path("export", run) / "model.safetensors").read_bytes()


def _losses(path, run, terms=TERMS):
    config = load_config(path, [f"run={run}"])
    (tracked,) = [found for found in read_runs(config) if found.name == run]
    return {term: read_history(config, tracked.run_id, f"train/{term}") for term in terms}


def _trained(config):
    return load_file(checkpoint.latest(config).path / checkpoint.TRAINED_FILE)


def _forget(config, step):
    """Removes the checkpoint of a step, as if the run had stopped before it."""
    shutil.rmtree(kinds.checkpoint_folder(config) / f"step-{step:08d}")


@pytest.mark.parametrize("loss", [TINY["loss"], DISTRIBUTION], ids=["distance", "distribution"])
def test_a_run_from_stored_states_equals_one_with_the_teacher_bit_for_bit(stored, world, capsys, loss):
    path = stored(loss=loss)
    online = _results(path, world, "teacher.mode=zero3", run="online")
    assert "the teacher computes the lowest 2 layers" in capsys.readouterr().err
    from_shards = _results(path, world, run="shards")
    printed = capsys.readouterr().err
    assert "training reads the teacher's states from the shards; no teacher is loaded" in printed
    assert "the shards have what the lowest 2 layers compute; the student runs those above" in printed
    assert len(online[0]["loss"]) == 4
    assert from_shards[0] == online[0]
    assert from_shards[1].keys() == online[1].keys()
    for name, tensor in online[1].items():
        assert torch.equal(tensor, from_shards[1][name]), name
    assert from_shards[2] == online[2]
    tags = {
        run.name: (run.tags["teacher_source"], run.tags.get("stored_trunk_depth"))
        for run in read_runs(load_config(path))
    }
    assert tags == {"online": ("loaded", None), "shards": ("states", "2")}


def test_sequences_of_different_lengths_train_as_with_the_teacher(stored, world):
    """A document per sequence: micro-batches with samples of different lengths."""
    packing = "corpus.packing='none'"
    path = stored(train={**SETTINGS, "micro_batch_size": 4})
    config = load_config(path, [packing])
    teacher = find_teacher(config)
    build_sequences(config, teacher.load_tokenizer(), teacher.tokenizer_digest)
    annotate(config, world)
    samples = list(read_samples(config.path("shards", "train") / INDEX, columns=["loss_mask", "teacher_states"]))
    assert len({len(sample["teacher_states"]) for sample in samples}) > 5
    for sample in samples:
        assert len(sample["teacher_states"]) == max(sample["loss_mask"].nonzero()[0], default=0) + 1
    online = _results(path, world, "teacher.mode=zero3", packing, run="online")
    from_shards = _results(path, world, packing, run="shards")
    # A batch of annotation has another shape than a micro-batch, so the last bits can differ.
    for term, values in online[0].items():
        assert len(values) == 4
        assert [v for _, v in from_shards[0][term]] == pytest.approx([v for _, v in values], rel=1e-5), term
    for name, tensor in online[1].items():
        torch.testing.assert_close(from_shards[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_run_resumes_whether_its_teacher_is_loaded_or_stored(stored, world):
    path = stored()
    whole = _results(path, world, "teacher.mode=zero3", run="whole")[:2]
    for run, first, then in (("a", "zero3", "auto"), ("b", "cached", "zero3")):
        config = load_config(path, [f"run={run}", f"teacher.mode={first}"])
        train(config, world)
        _forget(config, 4)
        resumed = load_config(path, [f"run={run}", f"teacher.mode={then}"])
        train(resumed, world, resume=True)
        assert report_status(resumed)
        assert _losses(path, run) == whole[0]
        for name, tensor in whole[1].items():
            assert torch.equal(tensor, _trained(resumed)[name]), name


def test_a_run_resumes_when_its_shards_get_states_and_when_they_lose_them(stored, world, monkeypatch):
    monkeypatch.setattr("dskd.shards.blocks.LARGEST_SHARD", 40_000)  # files of two samples, without states of six
    path, store = stored(store=[]), f"annotation.store=[{', '.join(BOTH)}]"
    whole = _results(path, world, run="whole")[:2]
    recipe = inputs.recipe(load_config(path))
    for run, first, then in (("gets", "annotation.store=[]", store), ("loses", store, "annotation.store=[]")):
        annotate(load_config(path, [first]), world)
        train(load_config(path, [f"run={run}", first]), world)
        _forget(load_config(path, [f"run={run}"]), 4)
        annotate(load_config(path, [then]), world)
        resumed = load_config(path, [f"run={run}", then])
        assert inputs.recipe(resumed) == recipe
        train(resumed, world, resume=True)
        assert _losses(path, run) == whole[0]
        for name, tensor in whole[1].items():
            assert torch.equal(tensor, _trained(resumed)[name]), name
    # Other rows are other shards.
    changed = ["run=gets", store, "annotation.kappa=1"]
    annotate(load_config(path, changed), world)
    with pytest.raises(UserError, match="shards: another one then"):
        train(load_config(path, changed), world, resume=True)


def test_two_ranks_equal_one_and_resume_on_one(stored, world):
    """Of 96 sequences the last ones are short, so the ranks have different numbers of positions."""
    path = stored(train={**SETTINGS, "num_workers": 1})
    one = _results(path, world, "train.num_workers=0", run="one")
    run_program("train.py", path, "run=two", ranks=2)
    two = load_config(path, ["run=two"])
    for resumed in (False, True):
        if resumed:
            _forget(two, 4)
            run_program("train.py", path, "run=two", "--resume")
        for term, values in _losses(path, "two").items():
            assert [value for _, value in values] == pytest.approx([v for _, v in one[0][term]], rel=2e-4), term
        for name, tensor in _trained(two).items():
            torch.testing.assert_close(tensor, one[1][name], rtol=1e-3, atol=2e-5)


def test_states_are_read_from_a_remote_copy(stored, world, tmp_path):
    path = stored()
    here = _results(path, world, run="here")
    far = tmp_path / "far"
    shards = load_config(path).path("shards")
    shutil.copytree(shards, far)
    for file in (shards / "train").iterdir():
        if file.name != "manifest.json":
            file.unlink()
    assert _same(_results(path, world, f"train.shard_remote={far}", run="remote"), here)


def _same(one, other):
    return (
        one[0] == other[0] and one[2] == other[2] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    )


def test_shards_with_only_the_last_states_let_the_student_compute_its_layers(stored, world, capsys):
    path = stored(["teacher_states"])
    online = _results(path, world, "teacher.mode=zero3", "student.shared_trunk='off'", run="online")
    capsys.readouterr()
    assert _same(_results(path, world, run="shards"), online)
    assert "the student computes all of its layers: no teacher is loaded, and the shards have no trunk_states" in (
        capsys.readouterr().err
    )
    named = "annotation.store=[teacher_states, trunk_states]"
    with pytest.raises(UserError, match="shared_trunk: on is not possible: no teacher is loaded, and the shards have"):
        train(load_config(path, ["run=forced", "student.shared_trunk='on'", named]), world)


def test_a_run_with_a_deeper_trunk_than_the_shards_starts_from_theirs(stored, world, capsys):
    path = stored(student={"layers": 3, "spacing": "first", "train_layers": 2})
    online = _results(path, world, "teacher.mode=zero3", "student.train_layers=1", run="online")
    capsys.readouterr()
    assert _same(_results(path, world, "student.train_layers=1", run="shards"), online)
    assert "the shards have what the lowest layer computes" in capsys.readouterr().err
    # The two runs have other trunks, between which their checkpoints do not fit.
    for run, mode, message in (
        ("shards", "zero3", r"trunk of 1 layers, but the run has one of 2 now; set teacher\.mode to auto, which reads"),
        ("online", "auto", r"trunk of 2 layers, but the run has one of 1 now; set teacher\.mode to zero3, so that"),
    ):
        config = load_config(path, [f"run={run}", f"teacher.mode={mode}", "student.train_layers=1"])
        _forget(config, 4)
        with pytest.raises(UserError, match=message):
            train(config, world, resume=True)


def test_a_run_that_trains_a_layer_below_the_stored_trunk_computes_all_layers(stored, world, capsys):
    path = stored(student={**STUDENT, "spacing": "first"})
    deeper = "student.train_layers=2"
    no_trunk = ("student.shared_trunk='off'", "annotation.store=[]")
    online = _results(path, world, "teacher.mode=zero3", deeper, *no_trunk, run="online")
    capsys.readouterr()
    assert _same(_results(path, world, deeper, run="shards"), online)
    printed = capsys.readouterr().err
    assert "training reads the teacher's states from the shards; no teacher is loaded" in printed
    assert "trunk_states of the shards enter layer 2, but this run shares only the lowest layer with" in printed
    with pytest.raises(UserError, match=r"shared_trunk: on .* enter layer 2, but .* make the shards again with `deep"):
        train(load_config(path, ["run=forced", deeper, "student.shared_trunk='on'"]), world)


def test_a_run_without_a_teachers_terms_starts_from_the_stored_trunk(stored, world, capsys):
    path = stored(loss={"kd_weight": 0.0, "min_relations": 3})
    alone = _results(path, world, "teacher.mode=zero3", run="alone")
    assert "computes all of its layers: no term of the loss reads the teacher" in capsys.readouterr().err
    from_shards = _results(path, world, run="shards")
    assert "the shards have what the lowest 2 layers compute" in capsys.readouterr().err
    assert _same(from_shards, alone)


def test_a_trained_head_is_compared_with_the_teachers_own_matrix(stored, world):
    path = stored(student={**STUDENT, "train_lm_head": True})
    online = _results(path, world, "teacher.mode=zero3", run="online")
    assert _same(_results(path, world, run="shards"), online)


def test_states_that_do_not_fit_the_run_are_refused(stored, world, monkeypatch):
    path = stored()
    folder = load_config(path).path("shards", "train")
    again = r"make the shards again with `deepspeed launcher/annotate\.py --config FILE`"
    with pytest.raises(UserError, match=rf"{folder}: .* in fp32, but precision is bf16.* to fp32, {again}"):
        train(load_config(path, ["precision=bf16"]), world)
    monkeypatch.setattr("dskd.models.precision.supports_bf16", lambda _: True)
    with pytest.raises(UserError, match=rf"in fp32, but precision: auto is bf16 on this machine.* to fp32, {again}"):
        train(load_config(path, ["precision=auto"]), world)
    inputs.load_inputs(load_config(path, ["precision=bf16"]))  # `dskd status` needs no states
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    for changes, message in (
        ({"hidden_size": 32}, rf"with 32 values, but this teacher's have 64 \(hidden_size .*{again}"),
        ({"dtype": "float16"}, rf"of type float16, and training computes in bfloat16 or float32; {again}"),
    ):
        update_manifest(folder, facts={**facts, "stored": {**facts["stored"], **changes}})
        with pytest.raises(UserError, match=message):
            train(load_config(path), world)
    update_manifest(folder, facts={name: value for name, value in facts.items() if name != "stored"})
    cached = ["teacher.mode=cached", "loss.hidden_weight=2"]
    with pytest.raises(UserError, match=r"annotation\.store names teacher_states, but these .* make them again with"):
        train(load_config(path, cached), world)
    with pytest.raises(UserError, match=r"no teacher_states, which loss.hidden_weight 2 reads .*make the shards again"):
        train(load_config(path, [*cached, "annotation.teacher_top_n=4"]), world)


def test_a_teacher_is_loaded_if_the_shards_have_none_of_its_states(copy_of_tiny, world, capsys):
    path = copy_of_tiny(*BEFORE_TRAINING, train={**TINY["train"], "steps": 1, "num_workers": 0})
    train(load_config(path), world)
    assert "the teacher is loaded, sharded over the ranks; the teacher computes" in capsys.readouterr().err
    named = load_config(path, ["run=named", "annotation.store=[teacher_states]"])
    train(named, world)
    assert "the teacher is loaded: annotation.store names teacher_states, but these shards have none" in (
        capsys.readouterr().err
    )
    assert _losses(path, "named")["loss"] == losses_of(path)
    with pytest.raises(UserError, match=r"annotation\.store names teacher_states, but these shards .* make them again"):
        inputs.load_inputs(
            load_config(
                path, ["teacher.mode=cached", "annotation.store=[teacher_states]", "annotation.teacher_top_n=0"]
            )
        )


@pytest.mark.parametrize(
    ("held", "overrides", "reason"),
    [
        (BOTH, [], None),
        (
            BOTH,
            ["teacher.mode=resident"],
            "teacher_states and trunk_states, .* teacher.mode is resident; set teacher.mode",
        ),
        (BOTH, ["loss.kd_weight=0"], "the shards have teacher_states, .* no term of the loss reads the teacher"),
        (
            BOTH[1:],
            [],
            r"trunk_states, .* there are no teacher_states, .* set annotation.store to \[teacher_states, trunk",
        ),
        (BOTH[1:], ["teacher.mode=zero3"], "set teacher.mode to auto, and annotation.store to"),
        (BOTH[:1], ["teacher.mode=cached", "annotation.teacher_top_n=8"], "store does not name them"),
    ],
)
def test_states_that_are_not_read_are_reported(tmp_path, held, overrides, reason):

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"workdir": str(tmp_path), "teacher": {"path": "a"}}))
    facts = {"stored": {"columns": held, "dtype": "float32", "hidden_size": 8, "trunk_depth": 2}}
    config = load_config(path, overrides)
    source = TeacherSource.of(config, SimpleNamespace(facts=facts))
    line = source.describe_unread(config)
    assert line is None if reason is None else re.search(reason, line)
    assert (source.kind == "top_n") == ("teacher.mode=cached" in overrides)
