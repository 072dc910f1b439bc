"""Parameters on a local disk: the same states, one folder per model, and missing requirements reported at once."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loaded_models import states_and_logits
from tiny_models import SHAPE, save_model
from transformers import LlamaConfig, LlamaForCausalLM

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.models.running import frozen, nvme
from dskd.models.running.frozen import load_frozen

IDS = torch.arange(24).view(2, 12)


def _config(tmp_path, **teacher):
    return Config(workdir=str(tmp_path), teacher={"path": str(tmp_path / "teacher"), **teacher}, precision="fp32")


def _why_not():
    """Returns why this test cannot run here: no test compiles DeepSpeed's operator, which takes minutes."""
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_default_build_root

    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "libaio or its headers are missing: make test-nvme"
    for library in Path(get_default_build_root()).rglob("async_io.so"):
        ninja = shutil.which("ninja")  # the one that torch calls: another version begins its log again
        command = [ninja or "true", "-n"]
        # Compiled from this very installation: from another one it is compiled again.
        is_own = str(Path(deepspeed.__file__).parent) in (library.parent / "build.ninja").read_text()
        if is_own and "no work" in subprocess.run(command, cwd=library.parent, capture_output=True, text=True).stdout:
            break
    else:
        return "DeepSpeed has not compiled async_io on this machine yet, which takes minutes: make test-nvme"
    return None


def test_a_model_on_a_local_disk_computes_the_same_and_leaves_nothing_there(tmp_path, world, monkeypatch):
    # As in an environment that is active: with another ninja torch would compile again.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    # `make test-nvme` has compiled it, and nothing may be skipped there.
    if "DSKD_TEST_NVME" not in os.environ and (reason := _why_not()):
        pytest.skip(reason)
    save_model(tmp_path / "teacher")
    shape = SHAPE | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "teacher")  # DeepSpeed keeps less than 1 MB here
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "of another run").mkdir()
    config = _config(tmp_path)
    plain = load_frozen(find_teacher(config), config, world)
    expected = plain.read(IDS, None, states_and_logits)
    plain.close()
    config = _config(tmp_path, offload="nvme", nvme_path=str(disk))
    both = [load_frozen(find_teacher(config), config, world) for _ in range(2)]
    assert len(list(disk.iterdir())) == 3
    assert len([file for file in disk.rglob("*.swp")]) == 2 * (4 * 5 + 2)
    for _ in range(3):
        for model in both:
            for one, other in zip(model.read(IDS, None, states_and_logits), expected, strict=True):
                assert torch.equal(one, other)
    for model in both:
        model.close()
    assert [folder.name for folder in disk.iterdir()] == ["of another run"]


def test_a_missing_disk_is_named_before_anything_is_loaded(tmp_path, world, monkeypatch):
    save_model(tmp_path / "teacher")
    monkeypatch.setattr(frozen, "build_sharded", lambda *arguments: pytest.fail("loaded"))
    config = _config(tmp_path, offload="nvme", nvme_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"teacher.nvme_path: there is no folder .*nowhere"):
        load_frozen(find_teacher(config), config, world)


def test_missing_requirements_of_async_io_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "_async_io_problem", lambda: "libaio is missing")
    with pytest.raises(UserError, match=r"teacher.offload: nvme needs DeepSpeed's async_io, but libaio is missing"):
        nvme.open_nvme_folder(str(tmp_path))


def test_a_disk_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, read_only):
    monkeypatch.setattr(nvme, "_async_io_problem", lambda: None)
    read_only(tmp_path)
    with pytest.raises(UserError, match=r"teacher\.nvme_path: .* cannot be written to \((Permission|Read-only)"):
        nvme.open_nvme_folder(str(tmp_path))


def test_the_next_process_deletes_what_a_killed_one_left_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "_async_io_problem", lambda: None)
    child = os.fork()
    if child == 0:
        nvme.open_nvme_folder(str(tmp_path))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (abandoned,) = tmp_path.iterdir()
    first, second = (nvme.open_nvme_folder(str(tmp_path)) for _ in range(2))
    assert not abandoned.exists()
    assert sorted(tmp_path.iterdir()) == sorted([first, second])
