"""The comparison of a loaded model with transformers' own, whole or layer by layer, and what it refuses.

Models that pass are in test_loading_buffers.py.
"""

import pytest
import torch
from loaded_models import load, save
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, word_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dskd.errors import UserError
from dskd.models.checks.reference import compare_with_transformers


def _compare(teacher, world, precision, **options):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    compare_with_transformers(teacher.engine, teacher.decoder, teacher.folder, world, dtype, **options)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_layers_between_the_compared_ones_pass_states_on(tmp_path, world, capsys, kind):
    """GPT-2's layers return a tuple, Llama's a tensor."""
    deep = {"gpt2": lambda: GPT2Config(vocab_size=120, n_embd=32, n_layer=8, n_head=4, n_positions=64)}
    deep["llama"] = lambda: LlamaConfig(**{**SHAPE, "num_hidden_layers": 8})
    AutoModelForCausalLM.from_config(deep[kind]()).save_pretrained(tmp_path / "teacher")
    word_tokenizer(["a"]).save_pretrained(tmp_path / "teacher")
    teacher = load(tmp_path / "teacher", world, mode="resident", precision="fp32")
    _compare(teacher, world, "fp32", small=0)
    assert "and what layers 0, 7 compute of 16 tokens" in capsys.readouterr().err
    teacher.close()


def test_a_buffer_that_was_cast_is_named(tmp_path, world):
    save(tmp_path / "teacher", "yarn")
    teacher = load(tmp_path / "teacher", world)
    rotations = teacher.decoder.base.rotary_emb
    rotations.inv_freq = rotations.inv_freq.bfloat16()
    with pytest.raises(UserError, match=r"buffers were changed(.|\n)*rotary_emb.inv_freq"):
        _compare(teacher, world, "bf16")
    teacher.close()


@pytest.mark.parametrize("small", [0, 2**30])
def test_a_table_rounded_to_bf16_is_found_at_late_positions(tmp_path, world, small):
    save(tmp_path / "teacher", "longrope")
    teacher = load(tmp_path / "teacher", world, mode="resident", precision="fp32")
    rotations = teacher.decoder.base.rotary_emb
    rotations.long_inv_freq = rotations.long_inv_freq.bfloat16().float()
    with pytest.raises(UserError, match="at positions from 4080 differ by"):
        _compare(teacher, world, "fp32", small=small)
    teacher.close()


@pytest.mark.parametrize("small", [0, 2**30])
def test_a_wrong_layer_is_named(tmp_path, world, small):
    save(tmp_path / "teacher", "deepseek_v3")
    teacher = load(tmp_path / "teacher", world, mode="resident", precision="fp32")
    teacher.decoder.layers[1].mlp.gate.e_score_correction_bias.zero_()
    place = "what layer 1 computes" if small == 0 else "the last hidden states"
    with pytest.raises(UserError, match=f"{place} on rank 0"):
        _compare(teacher, world, "fp32", small=small)
    teacher.close()


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_weights_that_are_not_finite_are_named_as_the_cause(tmp_path, world, mode):
    save(tmp_path / "teacher", "yarn")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][:] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights or states are not finite: the last hidden states on rank 0") as error:
        load(tmp_path / "teacher", world, mode=mode, precision="fp32")
    assert "computes something different" not in str(error.value)
