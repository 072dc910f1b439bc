"""Mistakes of users, with the programs themselves: a clear message, exit code 2, no traceback, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from artifact_folders import update_manifest
from rank_processes import run_program
from safetensors.torch import load_file, save_file
from tiny_work import BEFORE_TRAINING

from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.senses.build import build_senses
from dskd.shards.annotate import annotate
from dskd.training.train import train

pytestmark = pytest.mark.slow


def _refused(stage, config, world, *overrides, says):
    """Runs the stage itself in this process; the first test covers how a program reports its error."""
    with pytest.raises(UserError) as error:
        stage(load_config(config, overrides), world)
    for part in says:
        assert part in str(error.value)


@pytest.fixture
def refused(dskd):
    """Runs a verb, which must end with exit code 2, and returns its message."""

    def run(*arguments):
        code, _, message = dskd(*arguments)
        assert code == 2
        return message

    return run


def test_a_program_reports_a_mistake_once_without_a_traceback_and_exits_with_2(copy_of_tiny):
    config = copy_of_tiny(*BEFORE_TRAINING)
    for mistake, says in (
        ("loss.sens_weight=1", "did you mean loss.sense_weight?"),
        ("train.micro_batch_size=3", "divisor of 4"),
    ):
        finished = run_program("train.py", config, mistake, ranks=2, check=False)
        assert finished.exit_code == 2, finished.output
        assert finished.output.count("error: ") == 1, finished.output
        assert says in finished.output
        assert "Traceback" not in finished.output
    assert not load_config(config).path("checkpoints").exists()


def test_shards_of_another_sense_dictionary_are_refused(copy_of_tiny, world):
    config = copy_of_tiny(*BEFORE_TRAINING)
    path = load_config(config).path("senses")
    tensors = load_file(path / "senses.safetensors")
    tensors["vectors"] += 1
    save_file(tensors, path / "senses.safetensors")
    update_manifest(path)
    _refused(train, config, world, says=["different sense dictionaries (", "launcher/annotate.py"])


def test_shards_of_another_tokenizer_are_refused(copy_of_tiny, world):
    config = copy_of_tiny(*BEFORE_TRAINING)
    path = load_config(config).path("shards", "train", "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": "f" * 64}))
    _refused(
        train,
        config,
        world,
        says=["shards/train and what is here now: made with different tokenizers (", "ffffffffffff…"],
    )


def test_a_truncated_and_a_changed_shard_are_reported(copy_of_tiny, world):
    config = copy_of_tiny(*BEFORE_TRAINING)
    shard = load_config(config).path("shards", "train", "shard.00003.mds.zstd")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    _refused(train, config, world, says=["shard.00003.mds.zstd: the manifest says", "launcher/annotate.py"])
    shard.write_bytes(whole[:-7] + bytes(7))
    _refused(train, config, world, says=["shard.00003.mds.zstd: the content is not what the manifest says"])


def test_a_sense_file_of_another_hidden_size_is_refused(copy_of_tiny, world):
    config = copy_of_tiny(*BEFORE_TRAINING)
    path = load_config(config).path("senses")
    tensors = load_file(path / "senses.safetensors")
    tensors["vectors"] = tensors["vectors"].repeat(1, 2)
    save_file(tensors, path / "senses.safetensors")
    update_manifest(path)
    _refused(annotate, config, world, says=["128 dimensions, but the model's hidden states have 64"])


def test_a_dictionary_of_another_teacher_is_refused(copy_of_tiny, world):
    config = copy_of_tiny(*BEFORE_TRAINING)
    path = load_config(config).path("senses", "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "teacher": "e" * 64}))
    _refused(
        annotate, config, world, says=["senses and the teacher: made with different teachers (", "build_senses.py"]
    )


def test_a_missing_artifact_is_reported_with_the_command_that_makes_it(copy_of_tiny, world):
    config = copy_of_tiny("corpus", "teacher", "sequences")
    _refused(build_senses, config, world, says=["there is no lexicon here; make it with `dskd lexicon --config FILE`"])


def test_batches_that_are_too_large_or_cannot_be_divided_are_refused(copy_of_tiny, world):
    config = copy_of_tiny(*BEFORE_TRAINING)
    _refused(train, config, world, "train.global_batch_size=400", says=["there are 96 samples, fewer than"])
    _refused(train, config, world, "train.micro_batch_size=3", says=["set it to a divisor of 8"])


def test_a_teacher_without_weights_is_refused_by_the_student(copy_of_tiny, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    teacher = ["teacher.train_from_scratch=null", f"teacher.path={tmp_path / 'empty'}"]
    assert "there are no weights" in refused("student", "--config", copy_of_tiny(), *teacher)
    assert not (tmp_path / "work" / "student").exists()


def test_a_wrong_line_in_a_tsv_is_reported(copy_of_tiny, tmp_path, refused):
    (tmp_path / "bad.tsv").write_text("a\tsimilar\tb\n", encoding="utf-8")
    config = copy_of_tiny(lexicon={"wordnet": False, "tsv": [str(tmp_path / "bad.tsv")]})
    message = refused("lexicon", "--config", config)
    assert "bad.tsv:1: the relation must be synonym or antonym, found 'similar'" in message
    assert not list((tmp_path / "work").iterdir())


def test_an_unwritable_work_directory_is_refused(copy_of_tiny, tmp_path, read_only, refused):
    (tmp_path / "locked").mkdir()
    read_only(tmp_path / "locked")
    config = copy_of_tiny(workdir=str(tmp_path / "locked" / "work"))
    assert "set workdir to a folder you may write" in refused("lexicon", "--config", config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("student/model.safetensors", "the content is not what the manifest says"),
        ("senses/senses.safetensors", "the content is not what the manifest says"),
        ("teacher/model.safetensors", "this teacher has changed since it was made"),
        ("teacher/tokenizer_config.json", "this teacher has changed since it was made"),
    ],
)
def test_a_changed_input_of_training_is_reported(copy_of_tiny, world, name, message):
    config = copy_of_tiny(*BEFORE_TRAINING)
    file = load_config(config).path(name)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    _refused(train, config, world, says=[f"{name}: {message}", "make it again with `"])


def test_a_work_directory_in_which_nobody_may_write_is_refused(copy_of_tiny, refused):
    message = refused("lexicon", "--config", copy_of_tiny(workdir="/proc/work"))
    assert "set workdir to a folder you may write" in message


def test_a_work_directory_that_is_a_file_is_refused(copy_of_tiny, tmp_path, refused):
    (tmp_path / "file").write_text("x")
    config = copy_of_tiny(workdir=str(tmp_path / "file" / "work"))
    for overrides in ([], ["lexicon.wordnet=false", f"lexicon.tsv=[{tmp_path / 'file'}]"]):
        assert "cannot write there" in refused("lexicon", "--config", config, *overrides)


def test_code_in_a_checkpoint_is_not_run(copy_of_tiny, tmp_path):
    """DeepSpeed's files are read only as tensors and plain values, and a pickle that calls something is refused."""
    config = copy_of_tiny(*BEFORE_TRAINING, "checkpoints")
    base = load_config(config).path("checkpoints", "dskd")
    shutil.rmtree(base / "step-00000006")
    marker = tmp_path / "code-was-run"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    for file in (base / "step-00000003").glob("*.pt"):
        torch.save({"module": Evil()}, file)
    update_manifest(base / "step-00000003")
    finished = run_program("train.py", config, "--resume", ranks=2, check=False)
    assert finished.exit_code != 0
    assert not marker.exists()
