"""The student's engine: sums over micro-batches, its compiler, and its final norm."""

import gc

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from tiny_models import SHAPE, save_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MptConfig,
    OlmoConfig,
    OPTConfig,
)

from dskd.config import Config, StudentConfig
from dskd.errors import UserError
from dskd.losses.head import Normalizers
from dskd.models.files.folder import find_teacher
from dskd.models.structure.causal_lm import destroy_engine
from dskd.models.structure.trained import choose_trained
from dskd.students.student import build_student, find_student
from dskd.training.models.student import load_student

HEADS = {"vocab_size": 120, "n_layer": 2, "n_head": 4}


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
    destroy_engine(engine)
    return gradients


def test_compiled_losses_without_a_compiler_are_refused(monkeypatch, tmp_path, world):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    config = Config(workdir=str(tmp_path), teacher={"path": "t"}, train={"compile_losses": True})
    with pytest.raises(UserError, match=r"train.compile_losses: .* there is no .*no-such-compiler; install one"):
        load_student(None, config, world, teacher=None, margin=1.0, accumulation_steps=1)


def test_many_micro_batches_in_bf16_have_the_gradient_of_one_of_them(tmp_path, world):
    """A sum of 64 equal gradients in bf16 is off by 3 %: each addition rounds away digits of the gradient."""
    save_model(tmp_path / "teacher")
    config = Config(
        workdir=str(tmp_path),
        precision="bf16",
        teacher={"path": str(tmp_path / "teacher")},
        corpus={"packing": "stream"},
        student={"layers": 1, "train_layers": 1},
        loss={"sense_weight": 0.0},
        train={"micro_batch_size": 1},
    )
    build_student(config)
    one, many = (_gradients(config, world, number) for number in (1, 64))
    for name, gradient in one.items():
        assert (many[name] - gradient).norm() < 0.01 * gradient.norm(), name


@pytest.mark.parametrize(
    ("config", "norm"),
    [
        (LlamaConfig(**SHAPE), {"model.norm.weight"}),
        # Has learned positions too.
        (GPT2Config(**HEADS, n_embd=32, n_positions=64), {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        # Has a norm of its embeddings too.
        (BloomConfig(**HEADS, hidden_size=32), {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        # Constructs it before the layers, and has projections and learned positions.
        (
            OPTConfig(
                vocab_size=120,
                hidden_size=32,
                word_embed_proj_dim=16,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
            {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"},
        ),
        (
            GPTNeoXConfig(**{key: SHAPE[key] for key in SHAPE if key != "num_key_value_heads"}),
            {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"},
        ),
        # Calls it embedding_norm.
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2), {"model.embedding_norm.weight"}),
        (MptConfig(vocab_size=120, d_model=32, n_heads=4, n_layers=2), {"transformer.norm_f.weight"}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_final_norm_is_the_module_that_runs_after_the_last_layer(config, norm):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    chosen = choose_trained(model, StudentConfig(train_layers=0, train_final_norm=True))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == norm
    assert len(chosen) == len(norm)


def test_a_final_norm_that_has_no_parameters_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OlmoConfig(**SHAPE))
    with pytest.raises(UserError, match=r"student.train_final_norm: .* OlmoForCausalLM .* set it to false"):
        choose_trained(model, StudentConfig(train_layers=1, train_final_norm=True))


@pytest.mark.parametrize(("changes", "frozen"), [({}, set()), ({"train_final_norm": False}, {"ln_f"})])
def test_a_pretrained_student_is_trained_whole(changes, frozen):
    """With its table of positions, which is part of no layer."""
    model = AutoModelForCausalLM.from_config(GPT2Config(**HEADS, n_embd=32))
    choose_trained(model, StudentConfig(path="a/b", **changes))
    left = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert left == frozen


def test_without_its_embeddings_a_pretrained_student_keeps_its_positions():
    model = AutoModelForCausalLM.from_config(GPT2Config(**HEADS, n_embd=32))
    choose_trained(model, StudentConfig(path="a/b", train_embeddings=False, train_lm_head=False))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_a_destroyed_engine_holds_no_memory(tmp_path, world):
    """DeepSpeed's module-level lists refer to every engine, so one that is only destroyed stays in memory."""
    save_model(tmp_path / "teacher")
    config = Config(
        workdir=str(tmp_path),
        precision="fp32",
        teacher={"path": str(tmp_path / "teacher")},
        student={"layers": 2, "train_layers": 2, "train_embeddings": True},
        corpus={"packing": "stream"},
    )
    build_student(config)
    _gradients(config, world, micro_batches=1)  # what is allocated once per process is not counted
    before = _tensor_bytes()
    _gradients(config, world, micro_batches=1)
    trained = sum(file.stat().st_size for file in find_student(config).path.glob("*.safetensors"))
    assert _tensor_bytes() - before < trained / 2


def _tensor_bytes() -> int:
    gc.collect()
    # Other tests leave tensors of other types, such as fake ones, which have no memory.
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
