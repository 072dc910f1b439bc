"""The student's engine: what many micro-batches add up to."""

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from tiny_models import save_model

from dskd.config import Config
from dskd.errors import UserError
from dskd.head import Normalizers
from dskd.model_folder import find_teacher
from dskd.student import build_student, find_student
from dskd.student_engine import load_student


def _gradients(config, world, micro_batches):
    engine = load_student(
        find_student(config),
        config,
        world,
        teacher=find_teacher(config),
        margin=1.0,
        accumulation_steps=micro_batches,
    )
    ids = (torch.arange(24) * 11 % 117).view(1, 24)
    states = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for number in range(micro_batches):
        total, _ = engine(
            ids,
            labels=ids.roll(-1, 1),
            loss_mask=torch.ones(1, 24, dtype=torch.bool),
            normalizers=Normalizers(1 / 24, 1.0),
            teacher_hidden=states,
        )
        engine.backward(total)
        if number + 1 < micro_batches:
            engine.step()
    gradients = {n: safe_get_full_grad(p).float() for n, p in engine.module.named_parameters() if p.requires_grad}
    engine.destroy()
    return gradients


def test_compiled_losses_without_a_compiler_are_refused(monkeypatch, tmp_path, world):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    config = Config(workdir=str(tmp_path), teacher={"path": "t"}, train={"compile_losses": True})
    with pytest.raises(UserError, match=r"train.compile_losses: .* there is no .*no-such-compiler; install one"):
        load_student(None, config, world, teacher=None, margin=1.0, accumulation_steps=1)


def test_many_micro_batches_in_bf16_add_up_to_what_one_of_them_is(tmp_path, world):
    """In bf16 a sum of 256 equal gradients is off by a tenth: small ones are lost beside the sum."""
    save_model(tmp_path / "teacher")
    config = Config(
        workdir=str(tmp_path),
        precision="bf16",
        teacher={"path": str(tmp_path / "teacher")},
        corpus={"packing": "stream"},
        student={"layers": 3, "train_layers": 1, "shared_trunk": "off"},
        loss={"sense_weight": 0.0},
        train={"micro_batch_size": 1},
    )
    build_student(config)
    one, many = (_gradients(config, world, number) for number in (1, 256))
    for name, gradient in one.items():
        assert (many[name] - gradient).norm() < 0.01 * gradient.norm(), name
