import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dskd.config.reading import load_config
from dskd.errors import OutageError, UserError
from dskd.models.checks.agreement import check_agreement
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting import export
from dskd.training.exporting.export import build_export

pytestmark = pytest.mark.slow

PLAIN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dskd", "streaming"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("a happy", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0]))
"""


def test_the_export_loads_and_generates_with_nothing_of_ours(tiny, tmp_path):
    folder = load_config(tiny).path("export", "dskd")
    finished = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("a happy")


def test_the_export_is_the_student_with_the_trained_tensors(tiny):
    config = load_config(tiny)
    newest = checkpoint.latest(config)
    trained = load_file(newest.path / checkpoint.TRAINED_FILE)
    student = AutoModelForCausalLM.from_pretrained(config.path("student")).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(config.path("export", "dskd")).state_dict()
    assert exported.keys() == student.keys()
    for name, tensor in exported.items():
        if name in trained:
            assert torch.equal(tensor, trained[name])
            if "norm" not in name:
                assert not torch.equal(tensor, student[name])
        else:
            assert torch.equal(tensor, student[name]), name


def test_the_folder_of_an_export_may_be_a_link_to_another_disk(tiny, copy_of_tiny, tmp_path):
    """The fixture `resumed` of test_checkpoint.py tests the same for the folder of the checkpoints."""
    config = load_config(copy_of_tiny("teacher", "student", "checkpoints"))
    (tmp_path / "disk" / "export").mkdir(parents=True)
    config.path("export").mkdir()
    config.path("export", config.run).symlink_to(tmp_path / "disk" / "export")
    build_export(config)
    assert config.path("export", config.run).is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["export"]
    ours, theirs = (
        folder / "model.safetensors"
        for folder in (tmp_path / "disk" / "export", load_config(tiny).path("export", "dskd"))
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_export_that_computes_something_else_is_not_published(copy_of_tiny):
    config = load_config(copy_of_tiny("teacher", "student", "checkpoints"))
    newest = checkpoint.latest(config)
    probe = load_file(newest.path / checkpoint.PROBE_FILE)
    # Files of the right size with other content, which only hashes or a comparison of logits can detect.
    save_file({**probe, "logits": probe["logits"] + 1}, newest.path / checkpoint.PROBE_FILE)
    with pytest.raises(UserError, match=r"probe.safetensors: the content is not what the manifest says"):
        build_export(config)
    # The untrained student is not what was trained.
    trained = load_file(newest.path / checkpoint.TRAINED_FILE)
    with pytest.raises(UserError, match=r"student: reloaded, the model's logits differ .*; train again"):
        check_agreement(config.path("student"), probe, trained, torch.float32, False, remedy="train again")
    with pytest.raises(UserError, match=r"not the one that was written; train again[^$]*q_proj: transformers does not"):
        check_agreement(config.path("student"), probe, ["model.q_proj"], torch.float32, False, remedy="train again")
    assert not config.path("export").exists() or not list(config.path("export").iterdir())


def test_without_a_checkpoint_or_with_another_student_there_is_no_export(copy_of_tiny):
    config = load_config(copy_of_tiny("teacher", "student", "checkpoints"))
    manifest = config.path("student", "manifest.json")
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(UserError, match="trained from another student"):
        build_export(config)
    shutil.rmtree(config.path("checkpoints"))
    with pytest.raises(UserError, match="there is no checkpoint; train with"):
        build_export(config)


def test_a_checkpoint_that_training_replaces_meanwhile_is_reported(copy_of_tiny, monkeypatch):
    config = load_config(copy_of_tiny("teacher", "student", "checkpoints"))
    newest = checkpoint.latest(config)
    monkeypatch.setattr(
        export, "verify_files", lambda path, *_, **__: shutil.rmtree(path)
    )  # training removes it at that moment
    with pytest.raises(OutageError, match=r"step-00000006: training replaced this checkpoint.*export again"):
        build_export(config)
    assert not newest.path.exists()
    assert not [*config.path("export").glob("*")]
