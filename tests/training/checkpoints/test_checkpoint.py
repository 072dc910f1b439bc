"""Checkpoints: which one counts, which are kept, whether they fit on the disk, and resuming on other ranks."""

import json
import shutil
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from rank_processes import run_program
from safetensors.torch import load_file
from tiny_work import BEFORE_TRAINING, TINY, copy_work
from tracked_results import losses_of

from dskd.artifacts import kinds
from dskd.artifacts.lock import release_lock
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.training.checkpoints import checkpoint, writing
from dskd.training.checkpoints.universal import make_universal, no_pickles
from dskd.training.status import report_status
from dskd.training.train import train

pytestmark = pytest.mark.slow


def _names(config):
    names = {path.name for path in kinds.checkpoint_folder(load_config(config)).iterdir()}
    return sorted(names - {"tracking"})  # the messages for MLflow


@pytest.fixture(scope="module")
def resumed(tiny, world, tmp_path_factory):
    """The config of a run whose first 3 steps are those of `tiny`, on two ranks; one rank trained 2 more, then two one.

    They have other micro-batches, and the folder of checkpoints is a link to another disk. Killed processes left files
    there, without which the disk has space: at the start, for the universal form, and for the next checkpoint.
    """
    folder = tmp_path_factory.mktemp("resumed")
    settings = {**TINY["train"], "micro_batch_size": 8, "checkpoint_every": 1, "keep_last": 2, "keep_every": 3}
    path = copy_work(tiny, folder, *BEFORE_TRAINING, "checkpoints", train=settings)
    config = load_config(path)
    base = kinds.checkpoint_folder(config)
    base.rename(folder / "disk")
    base.symlink_to(folder / "disk")
    shutil.rmtree(base / "step-00000006")
    for left in (".step-00000006.partial", ".step-00000003.universal", ".step-00000003.universal.partial"):
        (base / left).mkdir()
        (base / left / "half.pt").write_bytes(b"half")
    (base / ".step-00000006.lock").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0 if [*base.glob(".step-*")] else 10**18))
        train(config, world, resume=True)
    release_lock(kinds.run_lock_path(config, config.run))
    shutil.rmtree(base / "step-00000006")  # as if the run had stopped after step 5
    output = run_program("train.py", path, "--resume", "train.micro_batch_size=1", ranks=2).output
    assert "into one for any number of ranks" in output
    return path


def test_a_run_resumes_on_any_number_of_ranks(tiny, resumed):
    """More and fewer than before, and in other micro-batches: losses and weights are those of an undisturbed run."""
    losses, undisturbed = losses_of(resumed), losses_of(tiny)[3:]
    assert [step for step, _ in losses] == [step for step, _ in undisturbed] == list(range(4, 7))
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in undisturbed], rel=2e-4)
    expected = load_file(checkpoint.latest(load_config(tiny)).path / checkpoint.TRAINED_FILE)
    last = checkpoint.latest(load_config(resumed), verify=True)
    for name, tensor in load_file(last.path / checkpoint.TRAINED_FILE).items():
        # Lost moments of the optimizer, or a step that was not counted, would change the weights at once.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def test_a_run_resumes_in_one_epoch_and_ends_in_the_next(copy_of_tiny, world):
    """96 sequences are three steps; the run resumes after the second, and its weights are the same bit for bit."""
    settings = {"global_batch_size": 32, "micro_batch_size": 16, "steps": 4, "checkpoint_every": 2, "num_workers": 0}
    path = copy_of_tiny(*BEFORE_TRAINING, train={**TINY["train"], **settings})
    config = load_config(path)
    train(config, world)
    newest = checkpoint.latest(config)
    undisturbed = load_file(newest.path / checkpoint.TRAINED_FILE)
    shutil.rmtree(newest.path)  # as if the run had stopped after step 2
    assert checkpoint.latest(config).step == 2
    train(config, world, resume=True)
    newest = checkpoint.latest(config)
    assert newest.step == 4
    for name, tensor in load_file(newest.path / checkpoint.TRAINED_FILE).items():
        assert torch.equal(tensor, undisturbed[name]), name


class _Attribute:
    """Pickled as a call of `getattr`."""

    def __init__(self, *of):
        self.of = of

    def __reduce__(self):
        return getattr, self.of


def test_a_checkpoint_of_debians_python_is_read_and_no_other_attribute(tmp_path):
    """Python 3.11.2 pickles the stage of ZeRO as an attribute of its enumeration."""
    torch.save({"zero_stage": _Attribute(ZeroStageEnum, "weights")}, tmp_path / "stage.pt")
    torch.save({"zero_stage": _Attribute(ZeroStageEnum, "mro")}, tmp_path / "method.pt")
    torch.save({"zero_stage": _Attribute(OrderedDict, "fromkeys")}, tmp_path / "other.pt")
    with no_pickles():  # which overrides `weights_only=False`, with which DeepSpeed reads its files
        assert torch.load(tmp_path / "stage.pt", weights_only=False) == {"zero_stage": ZeroStageEnum.weights}
        for name in ("method.pt", "other.pt"):
            with pytest.raises(ValueError, match="a checkpoint has no use for the attribute"):
                torch.load(tmp_path / name, weights_only=False)


def test_leftovers_of_killed_processes_are_removed_before_space_is_checked(resumed):
    base = kinds.checkpoint_folder(load_config(resumed))
    assert not [*base.glob(".*")]
    assert base.is_symlink()


def test_keep_every_keeps_checkpoints_in_addition_to_the_newest(resumed):
    assert _names(resumed) == ["latest", "step-00000003", "step-00000005", "step-00000006"]  # 4 was removed


def _spoil(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [_spoil, _truncate])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(copy_of_tiny, capsys, damage):
    config = load_config(copy_of_tiny("checkpoints"))
    newest = checkpoint.latest(config, verify=True)
    assert newest.step == 6
    damage(next(newest.path.glob("*optim_states.pt")))
    assert checkpoint.latest(config, verify=True).step == 3
    assert "skipping this checkpoint" in capsys.readouterr().err
    shutil.rmtree(kinds.checkpoint_folder(config) / "step-00000003")
    with pytest.raises(UserError, match=r"no checkpoint is complete.*--overwrite"):
        checkpoint.latest(config, verify=True)


def test_the_file_latest_names_the_checkpoint_that_counts(copy_of_tiny):
    config = load_config(copy_of_tiny("checkpoints"))
    (kinds.checkpoint_folder(config) / "latest").write_text("step-00000003\n")
    assert checkpoint.latest(config).step == 3
    (kinds.checkpoint_folder(config) / "latest").unlink()
    assert checkpoint.latest(config).step == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "this file does not name a checkpoint; using the newest complete one"),
        (b"", "this file does not name a checkpoint; using the newest complete one"),
        (b"step-00000099\n", "this file names step 99, which is missing; using the one before"),
    ],
)
def test_a_damaged_file_latest_is_reported_and_costs_no_checkpoint(copy_of_tiny, capsys, content, message):
    config = load_config(copy_of_tiny("checkpoints"))
    (kinds.checkpoint_folder(config) / "latest").write_bytes(content)
    assert checkpoint.latest(config).step == 6
    assert f"{kinds.checkpoint_folder(config) / 'latest'}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("verify", [False, True])
def test_a_checkpoint_is_found_while_training_replaces_them(copy_of_tiny, capsys, monkeypatch, verify):
    config = load_config(copy_of_tiny("checkpoints"))
    base = kinds.checkpoint_folder(config)
    (base / "latest").write_text("step-00000003\n")  # as if the newer one were still being written
    read_name = "verify_files" if verify else "read_manifest"
    read = getattr(checkpoint, read_name)

    def read_after_the_next_checkpoint(path, *arguments, **options):
        if path.name == "step-00000003":
            (base / "latest").write_text("step-00000006\n")
            shutil.rmtree(path)
        return read(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, read_name, read_after_the_next_checkpoint)
    assert checkpoint.latest(config, verify=verify).step == 6
    assert capsys.readouterr().err == ""


def test_a_checkpoint_without_total_steps_in_its_manifest_is_skipped(copy_of_tiny, capsys):
    config = load_config(copy_of_tiny("checkpoints"))
    path = kinds.checkpoint_folder(config) / "step-00000006" / "manifest.json"
    content = json.loads(path.read_text())
    del content["facts"]["total_steps"]
    path.write_text(json.dumps(content))
    assert checkpoint.latest(config).step == 3
    assert 'manifest.json has no total_steps under "facts"; skipping this checkpoint' in capsys.readouterr().err


def test_a_run_whose_final_checkpoint_is_damaged_is_not_finished(copy_of_tiny, capsys):
    config = load_config(copy_of_tiny(*BEFORE_TRAINING, "checkpoints"))
    assert report_status(config)
    _spoil(next(checkpoint.latest(config).path.glob("*optim_states.pt")))
    assert not report_status(config)
    assert "run 'dskd': step 3 of 6" in capsys.readouterr().out


def test_space_for_the_universal_form_is_checked_before_anything_is_written(copy_of_tiny, monkeypatch):
    newest = checkpoint.latest(load_config(copy_of_tiny("checkpoints")))
    before = sorted(newest.path.parent.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    message = "for resuming with another number of ranks: .* MB are needed, but only 0.10 KB are free"
    with pytest.raises(UserError, match=message):
        make_universal(newest.path)
    assert sorted(newest.path.parent.iterdir()) == before


def test_a_full_disk_is_reported_before_anything_is_trained(copy_of_tiny, world, monkeypatch):
    config = load_config(copy_of_tiny(*BEFORE_TRAINING, "checkpoints"), ["tracking.enabled=false"])
    sizes = []
    real = writing.required_bytes
    monkeypatch.setattr(writing, "required_bytes", lambda engine: sizes.append(real(engine)) or 10**18)
    with pytest.raises(UserError, match=r"for a checkpoint: 931,322,574.62 GB are needed, but only .*--resume"):
        train(config, world, overwrite=True)
    newest = checkpoint.latest(config)
    assert newest.step == 6
    size = sum(entry["size_bytes"] for entry in newest.manifest.files.values())
    assert 0.9 * size < sizes[0] < 1.5 * size


def test_a_cached_teacher_is_part_of_the_recipe(copy_of_tiny, world, capsys):
    path = copy_of_tiny(*BEFORE_TRAINING, "checkpoints")
    assert report_status(load_config(path))
    assert not report_status(load_config(path, ["teacher.mode=cached"]))
    assert "teacher.mode" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"trained with other settings or inputs than run 'dskd'"):
        train(load_config(path, ["teacher.mode=cached"]), world, resume=True)
    # Settings that only change the use of memory do not.
    assert report_status(load_config(path, ["train.loss_chunk_size=7", "train.activation_checkpointing=true"]))


def test_a_cached_teacher_of_another_vocabulary_is_refused(copy_of_tiny, world, monkeypatch):
    from dskd.training import inputs

    config = load_config(copy_of_tiny(*BEFORE_TRAINING), ["teacher.mode=cached"])
    student = SimpleNamespace(path="student", load_config=lambda: SimpleNamespace(vocab_size=7))
    teacher = SimpleNamespace(path="teacher", load_config=lambda: SimpleNamespace(vocab_size=9))
    with pytest.raises(UserError, match=r"teacher has 9 tokens and student has 7"):
        inputs._require_one_vocabulary(config, teacher, student)
    inputs.load_inputs(config)
    with pytest.raises(UserError, match=r"teacher_top_n: 3, but .* holds the teacher's 4 most"):
        inputs.load_inputs(load_config(copy_of_tiny(), ["teacher.mode=cached", "annotation.teacher_top_n=3"]))
