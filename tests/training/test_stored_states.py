"""Training from states that annotation stored: the same run as with a loaded teacher, and what is refused."""

import contextlib
import io
import json
import os
import re
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml
from artifact_folders import update_manifest
from config_files import write_config
from rank_processes import run_program
from safetensors.torch import load_file
from stages import build_sequences_of
from tiny_work import BEFORE_TRAINING, NO_RUNS, TINY, copy_work

from dskd.artifacts import kinds
from dskd.artifacts.mds import INDEX, read_samples
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.shards.annotate import annotate
from dskd.students.student import build_student
from dskd.tracking import read_history, read_runs
from dskd.training import inputs
from dskd.training.checkpoints import checkpoint
from dskd.training.data.loader import shorter_shards_named
from dskd.training.exporting.export import build_export
from dskd.training.models.teacher_source import TeacherSource, as_annotated
from dskd.training.status import report_status
from dskd.training.train import train

pytestmark = pytest.mark.slow

BOTH = ["teacher_states", "trunk_states"]
WITHOUT_STATES, WITH_STATES = "annotation.store=[]", f"annotation.store=[{', '.join(BOTH)}]"
LOADED = "teacher.mode=zero3"
# Sequences of one length, and batches of one size: what a kernel computes for a position is the same in both passes.
BATCH = 6
SETTINGS = {
    **TINY["train"],
    **{"global_batch_size": 2 * BATCH, "micro_batch_size": BATCH, "num_workers": 0},
    **{"steps": 4, "checkpoint_every": 4},
}
EVERY_STEP = ["train.checkpoint_every=1", "train.keep_last=4"]
STUDENT = {"layers": 3, "train_layers": 1}
ITS_LAYERS = [0, 1, 3]  # of the teacher, named where more of them are trained: others would be chosen
DISTRIBUTION = {"hidden_weight": 2.0, "sense_form": "distribution", "sense_random_candidates": 20, "min_relations": 3}
TERMS = ("loss", "ce", "kl", "sense", "grad_norm")


class Trained(NamedTuple):
    """A run that was trained: its losses, its trained tensors, and what training printed."""

    losses: dict[str, list[tuple[int, float]]]
    weights: dict[str, torch.Tensor]
    printed: str


@pytest.fixture(scope="module", autouse=True)
def _files_of_two_samples():
    """Limits files with states to two samples; those without have six."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dskd.shards.blocks.LARGEST_SHARD", 40_000)
        yield


@pytest.fixture(scope="module")
def stored(tiny, world, tmp_path_factory):
    """The config of a work directory whose shards have states; no test may change its artifacts before training."""
    folder = tmp_path_factory.mktemp("stored")
    shutil.copyfile(tiny.parent / NO_RUNS, folder / NO_RUNS)  # for copies
    annotation = {**TINY["annotation"], "batch_size": BATCH, "teacher_top_n": 0, "store": BOTH}
    path = copy_work(tiny, folder, *BEFORE_TRAINING, annotation=annotation, student=STUDENT, train=SETTINGS)
    build_student(load_config(path))
    annotate(load_config(path), world)
    return path


@pytest.fixture(scope="module")
def online(stored, world):
    """The run of the config with a teacher, which has a checkpoint of each step and an export."""
    return _train(stored, world, LOADED, *EVERY_STEP, run="online", exports=True)


@pytest.fixture(scope="module")
def from_shards(stored, world):
    """The run of the config without a teacher, and its export."""
    return _train(stored, world, run="shards", exports=True)


@pytest.fixture
def copy_of_stored(stored, tmp_path):
    """Writes a config with a work directory of its own, which begins as that of `stored`, without its runs."""

    def copy(*more, **changes):
        return copy_work(stored, tmp_path, *BEFORE_TRAINING, *more, **changes)

    return copy


@pytest.fixture
def changed(stored, tmp_path):
    """Writes the config of `stored` with other sections, for other runs in the same work directory."""
    return lambda **sections: write_config(tmp_path / "changed.yaml", yaml.safe_load(stored.read_text()), **sections)


def _train(path, world, *overrides, run, exports=False, resume=False):
    config = load_config(path, [f"run={run}", *overrides])
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        train(config, world, resume=resume)
    if exports:  # what is exported is compared with the model in training
        build_export(config)
    return Trained(_losses(path, run), _weights(config), printed.getvalue())


def _losses(path, run):
    config = load_config(path)
    (tracked,) = [found for found in read_runs(config) if found.name == run]
    return {term: read_history(config, tracked.run_id, f"train/{term}") for term in TERMS}


def _weights(config):
    return load_file(checkpoint.latest(config).path / checkpoint.TRAINED_FILE)


def _require_same(one, other):
    """The losses and the trained tensors of two runs are the same bit for bit; the former from `one`'s first on."""
    count = len(one.losses["loss"])
    assert count
    assert one.losses == {term: values[-count:] for term, values in other.losses.items()}
    assert one.weights.keys() == other.weights.keys()
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name


def _forget(config, *steps):
    """Removes the checkpoints of some steps, as if the run had stopped before them."""
    for step in steps:
        shutil.rmtree(kinds.checkpoint_folder(config) / f"step-{step:08d}")


def test_a_run_from_stored_states_equals_one_with_the_teacher_bit_for_bit(stored, online, from_shards):
    assert "the teacher computes the lowest 2 layers" in online.printed
    assert "training reads the teacher's states from the shards; no teacher is loaded" in from_shards.printed
    assert "the shards have what the lowest 2 layers compute; the student runs those above" in from_shards.printed
    assert len(online.losses["loss"]) == 4
    _require_same(from_shards, online)
    config = load_config(stored)
    exports = [config.path("export", run) / "model.safetensors" for run in ("online", "shards")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    tags = {run.name: (run.tags["teacher_source"], run.tags.get("stored_trunk_depth")) for run in read_runs(config)}
    assert (tags["online"], tags["shards"]) == (("loaded", None), ("states", "2"))


def test_a_trained_head_and_distributions_of_senses_are_compared_with_the_teachers_own(changed, world):
    path = changed(loss=DISTRIBUTION, student={**STUDENT, "train_lm_head": True})
    _require_same(_train(path, world, run="head"), _train(path, world, LOADED, run="head-online"))


def test_sequences_of_different_lengths_train_as_with_the_teacher(copy_of_stored, world):
    """A document per sequence: micro-batches with samples of different lengths."""
    corpus = ["corpus.packing='none'", "corpus.max_sequences=48", "corpus.max_validation_sequences=4"]
    path = copy_of_stored()
    config = load_config(path, corpus)
    build_sequences_of(config)
    annotate(config, world)
    samples = list(read_samples(config.path("shards", "train") / INDEX, columns=["loss_mask", "teacher_states"]))
    assert len({len(sample["teacher_states"]) for sample in samples}) > 5
    for sample in samples:
        assert len(sample["teacher_states"]) == max(sample["loss_mask"].nonzero()[0], default=0) + 1
    online = _train(path, world, LOADED, *corpus, run="online")
    from_shards = _train(path, world, *corpus, run="shards")
    # A batch of annotation has another shape than a micro-batch, so the last bits can differ.
    for term, values in online.losses.items():
        assert len(values) == 4
        assert [v for _, v in from_shards.losses[term]] == pytest.approx([v for _, v in values], rel=1e-5), term
    for name, tensor in online.weights.items():
        torch.testing.assert_close(from_shards.weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_run_resumes_when_its_teacher_is_stored_and_when_its_shards_lose_and_get_states(
    tiny, copy_of_stored, online, world
):
    """Each time it resumes from what it has trained since the last change, and ends like a run without changes."""
    path = copy_of_stored("checkpoints")
    recipe = inputs.recipe(load_config(path))
    for forgotten, store, source in (
        ((2, 3, 4), WITHOUT_STATES, "the teacher is loaded"),
        ((3, 4), WITH_STATES, "no teacher is loaded"),
    ):
        config = load_config(path, ["run=online", store])
        _forget(config, *forgotten)
        annotate(config, world)
        assert inputs.recipe(config) == recipe
        resumed = _train(path, world, store, *EVERY_STEP, run="online", resume=True)
        assert source in resumed.printed
        assert [step for step, _ in resumed.losses["loss"]] == [2, 3, 4]  # the first one is in another database
        _require_same(resumed, online)
        assert report_status(load_config(path, ["run=online", store, LOADED]))
    # Shards with other samples: those of `tiny` have the teacher's most probable tokens.
    shards = config.path("shards", "train")
    shutil.rmtree(shards)
    shutil.copytree(load_config(tiny).path("shards", "train"), shards)
    _forget(config, 4)
    with pytest.raises(UserError, match="shards: changed"):
        train(config, world, resume=True)


def test_two_ranks_equal_one(stored, from_shards):
    """Of 96 sequences the last ones are short, so the ranks have different numbers of positions."""
    run_program("train.py", stored, "run=two", "train.num_workers=1", ranks=2)
    for term, values in _losses(stored, "two").items():
        assert [value for _, value in values] == pytest.approx(
            [value for _, value in from_shards.losses[term]], rel=2e-4
        ), term
    for name, tensor in _weights(load_config(stored, ["run=two"])).items():
        torch.testing.assert_close(tensor, from_shards.weights[name], rtol=1e-3, atol=2e-5)


def test_states_are_read_from_a_remote_copy(copy_of_stored, from_shards, world, tmp_path):
    path, far = copy_of_stored(), tmp_path / "far"
    shards = load_config(path).path("shards")
    shutil.copytree(shards, far)
    for file in (shards / "train").iterdir():
        if file.name != "manifest.json":
            file.unlink()
    # With `cached` as with `auto`.
    remote = _train(path, world, f"train.shard_remote={far}", "teacher.mode=cached", run="remote")
    assert "training reads the teacher's states from the shards" in remote.printed
    _require_same(remote, from_shards)


def test_shards_with_only_the_last_states_let_the_student_compute_its_layers(copy_of_stored, world):
    path, last = copy_of_stored(), "annotation.store=[teacher_states]"
    annotate(load_config(path, [last]), world)
    online = _train(path, world, LOADED, last, "student.shared_trunk='off'", run="online")
    from_shards = _train(path, world, last, run="shards", exports=True)
    _require_same(from_shards, online)
    assert "the student computes all of its layers: no teacher is loaded, and the shards have no trunk_states" in (
        from_shards.printed
    )
    with pytest.raises(UserError, match="shared_trunk: on is not possible: no teacher is loaded, and the shards have"):
        train(load_config(path, ["run=forced", "student.shared_trunk='on'", WITH_STATES]), world)


def test_a_run_with_a_deeper_trunk_than_the_shards_starts_from_theirs(copy_of_stored, online, world):
    path = copy_of_stored("checkpoints", student={"layers": ITS_LAYERS, "train_layers": 2})
    annotate(load_config(path), world)
    overrides = ["student.train_layers=1", "train.checkpoint_every=2"]
    from_shards = _train(path, world, *overrides, run="deeper", exports=True)
    _require_same(from_shards, online)
    assert "the shards have what the lowest layer computes" in from_shards.printed
    # The two runs have other trunks, between which their checkpoints do not fit.
    for run, mode, message in (
        ("deeper", "zero3", r"trunk of 1 layers, but the run has one of 2 now; set teacher\.mode to auto, which reads"),
        ("online", "auto", r"trunk of 2 layers, but the run has one of 1 now; set teacher\.mode to zero3, so that"),
    ):
        config = load_config(path, [f"run={run}", f"teacher.mode={mode}", *overrides])
        _forget(config, 4)
        with pytest.raises(UserError, match=message):
            train(config, world, resume=True)


def test_a_run_that_trains_a_layer_below_the_stored_trunk_computes_all_layers(stored, world):
    below = [f"student.layers={ITS_LAYERS}", "student.train_layers=2"]
    online = _train(stored, world, LOADED, *below, "student.shared_trunk='off'", WITHOUT_STATES, run="below-online")
    from_shards = _train(stored, world, *below, run="below")
    _require_same(from_shards, online)
    assert "training reads the teacher's states from the shards; no teacher is loaded" in from_shards.printed
    assert "trunk_states of the shards enter layer 2, but this run shares only the lowest layer with" in (
        from_shards.printed
    )
    with pytest.raises(UserError, match=r"shared_trunk: on .* enter layer 2, but .* make the shards again with `deep"):
        train(load_config(stored, ["run=forced", *below, "student.shared_trunk='on'"]), world)


def test_a_run_without_a_teachers_terms_starts_from_the_stored_trunk(changed, world):
    path = changed(loss={"kd_weight": 0.0, "min_relations": 3})
    alone = _train(path, world, LOADED, run="alone")
    assert "computes all of its layers: no term of the loss reads the teacher" in alone.printed
    from_shards = _train(path, world, run="alone-shards")
    assert "the shards have what the lowest 2 layers compute" in from_shards.printed
    _require_same(from_shards, alone)


def test_states_that_do_not_fit_the_run_are_refused(copy_of_stored, world, monkeypatch):
    path = copy_of_stored()
    folder = load_config(path).path("shards", "train")
    again = r"make the shards again with `deepspeed launcher/annotate\.py --config FILE`"
    with pytest.raises(UserError, match=rf"{folder}: .* in fp32, but precision is bf16.* to fp32, {again}"):
        train(load_config(path, ["precision=bf16"]), world)
    monkeypatch.setattr("dskd.models.running.precision.supports_bf16", lambda _: True)
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
    with pytest.raises(
        UserError,
        match=r"no teacher_states, which teacher.mode: cached reads for loss.hidden_weight 2; make the shards again",
    ):
        train(load_config(path, [*cached, "annotation.teacher_top_n=4"]), world)


def test_a_teacher_is_loaded_if_the_shards_have_none_of_its_states(copy_of_tiny):
    path, last = copy_of_tiny(*BEFORE_TRAINING), "annotation.store=[teacher_states]"
    for overrides, line in (
        ([], "the teacher is loaded, sharded over the ranks"),
        ([last], "the teacher is loaded: annotation.store names teacher_states, but these shards have none"),
    ):
        config = load_config(path, overrides)
        source = inputs.load_inputs(config).source
        assert source.kind == "loaded"
        assert source.describe(config).startswith(line)
    with pytest.raises(UserError, match=r"annotation\.store names teacher_states, but these shards .* make them again"):
        inputs.load_inputs(load_config(path, ["teacher.mode=cached", last, "annotation.teacher_top_n=0"]))
    with pytest.raises(UserError, match=r"teacher_top_n: 0, but .* holds the teacher's 4 most probable tokens"):
        inputs.load_inputs(load_config(path, ["teacher.mode=cached", "annotation.teacher_top_n=0"]))


def test_a_shard_that_became_shorter_is_named_wherever_the_death_of_a_worker_is_noticed(copy_of_stored):
    config = load_config(copy_of_stored())
    died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
    with pytest.raises(RuntimeError, match="pid 7"), shorter_shards_named(config):
        raise died  # no shard is shorter, so it is reported as it is
    shard = sorted(config.path("shards", "train").glob("*.mds"))[-1]
    os.truncate(shard, 4096)
    with (
        pytest.raises(UserError, match=rf"{shard.name} has 4,096 bytes, but the index says"),
        shorter_shards_named(config),
    ):
        raise died
    with pytest.raises(RuntimeError, match="of another kind"), shorter_shards_named(config):
        raise RuntimeError("of another kind")


def test_cached_reads_whatever_the_shards_have(stored, world):
    """The config names no states, as that of a colleague who uses shards that exist."""
    config = load_config(stored, ["teacher.mode=cached", WITHOUT_STATES, "loss.hidden_weight=2"])
    source = inputs.load_inputs(config).source
    assert (source.kind, source.reads_trunk) == ("states", True)
    planned = as_annotated(config, inputs.load_inputs(config).shards)
    assert planned.annotation.store == ("teacher_states", "trunk_states")
    assert TeacherSource.planned(planned).kind == "states"
    with pytest.raises(UserError, match=r"teacher_top_n: 4, but .* holds teacher_states, .*; set it to 0"):
        inputs.load_inputs(load_config(stored, ["teacher.mode=cached", WITHOUT_STATES, "annotation.teacher_top_n=4"]))
    # Annotation would make them again, without states.
    with pytest.raises(UserError, match="hidden_weight 2 needs the teacher's states, which"):
        annotate(config, world)


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
    write_config(path, {"workdir": str(tmp_path), "teacher": {"path": "a"}})
    facts = {"stored": {"columns": held, "dtype": "float32", "hidden_size": 8, "trunk_depth": 2}}
    config = load_config(path, overrides)
    source = TeacherSource.of(config, SimpleNamespace(facts=facts))
    line = source.describe_unread(config)
    assert line is None if reason is None else re.search(reason, line)
    assert (source.kind == "top_n") == ("teacher.mode=cached" in overrides)
