"""Every tensor of a loaded model against the one that transformers loads, in both modes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
)

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.stored_names import base_model

MHA = {**SHAPE, "num_key_value_heads": 4, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.1, 3.7, 9.3, 30.1]}
CONFIGS = {
    "yarn": lambda: LlamaConfig(**{**SHAPE, "max_position_embeddings": 256}, rope_scaling=YARN),
    "llama3": lambda: LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 4096},
        rope_scaling={**LLAMA3, "original_max_position_embeddings": 64},
    ),
    "longrope": lambda: Phi3Config(
        **{**MHA, "max_position_embeddings": 4096}, original_max_position_embeddings=64, rope_scaling=LONGROPE
    ),
    "gemma3": lambda: Gemma3TextConfig(**MHA, head_dim=8),
    "bloom": lambda: BloomConfig(vocab_size=120, hidden_size=32, n_layer=3, n_head=4),
    "gpt2": lambda: GPT2Config(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "deepseek_v3": lambda: DeepseekV3Config(
        **MHA,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}


def save(folder, name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    stored = set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
        for key, buffer in model.named_buffers():
            if key in stored:
                buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    word_tokenizer([f"w{index}" for index in range(100)]).save_pretrained(folder)


def load(folder, world, *, mode="zero3", precision="bf16"):
    from dskd.models.folder import find_teacher
    from dskd.models.frozen import load_frozen

    config = Config(
        workdir=str(folder.parent),
        teacher={"path": str(folder), "mode": mode},
        precision=precision,
        corpus={"packing": "stream", "sequence_length": 32},
    )
    return load_frozen(find_teacher(config), config, world)


def tensors_of(model):
    """Returns buffers, and tensors that are plain attributes, by name."""
    tensors = dict(model.named_buffers())
    for prefix, module in model.named_modules():
        tensors |= {f"{prefix}.{k}": v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
    return tensors


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["zero3", "resident"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_buffer_is_the_one_that_transformers_loads(tmp_path, world, name, mode, precision):
    save(tmp_path / "teacher", name)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=dtype).eval()
    reference = tensors_of(base_model(expected))
    teacher = load(tmp_path / "teacher", world, mode=mode, precision=precision)
    loaded = tensors_of(teacher.decoder.base)
    assert reference.keys() <= loaded.keys()  # longrope keeps the table of late positions that it made when it ran
    for key, tensor in reference.items():
        assert loaded[key].dtype == tensor.dtype, key
        assert torch.equal(loaded[key], tensor), key
    teacher.close()


@pytest.mark.parametrize("mode", ["zero3", "resident"])
@pytest.mark.parametrize(("name", "late"), [("yarn", 200), ("longrope", 4000), ("llama3", 4000), ("gpt2", 50)])
def test_states_at_late_positions_in_bf16_are_those_of_transformers(tmp_path, world, name, late, mode):
    save(tmp_path / "teacher", name)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16).eval()
    teacher = load(tmp_path / "teacher", world, mode=mode)
    ids = torch.arange(24).view(2, 12) + 3
    for start in (late, 0):
        positions = torch.arange(start, start + 12).expand(2, 12)
        with torch.no_grad():
            states = base_model(expected)(input_ids=ids, position_ids=positions).last_hidden_state
        error = (teacher.hidden_states(ids, positions) - states).float().norm() / states.float().norm()
        assert error < 0.01
    teacher.close()


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_unused_tensors_and_missing_buffers_are_named(tmp_path, world, mode):
    save(tmp_path / "teacher", "deepseek_v3")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 2)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old folders have it; it is computed
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load(tmp_path / "teacher", world, mode=mode)
    assert "there is no tensor model.layers.2.mlp.gate.e_score_correction_bias" in str(error.value)
    assert "model.layers.1.self_attn.q_proj.lora_A.weight: the architecture has no such tensor" in str(error.value)
    assert "inv_freq" not in str(error.value)


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_integers_in_place_of_weights_are_called_quantised(tmp_path, world, mode):
    save(tmp_path / "teacher", "llama3")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is stored as I8: a quantised model"):
        load(tmp_path / "teacher", world, mode=mode)


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_tensors_of_layers_that_predict_further_tokens_are_left_out(tmp_path, world, mode):
    save(tmp_path / "teacher", "deepseek_v3")
    folder = tmp_path / "teacher"
    values = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors") | {"model.layers.4.eh_proj.weight": torch.zeros(32, 64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder, world, mode=mode).close()
