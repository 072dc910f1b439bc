"""Every tensor and the states of a loaded model against those that transformers loads, in both modes."""

import json

import pytest
import torch
from loaded_models import CONFIGS, load, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dskd.errors import UserError
from dskd.models.checks.reference import compare_with_transformers
from dskd.models.structure.base_model import base_model

LATE = {"yarn": 200, "longrope": 4000, "llama3": 4000, "gpt2": 50}  # positions at which rotations or tables are largest
# Sharded loading is tried in the format in which a cast buffer shows, and whole models in the one that shows small
# errors; some models in the other two combinations, too.
LOADED = [(name, *how) for name in CONFIGS for how in (("zero3", "bf16"), ("resident", "fp32"))]
LOADED += [(name, *how) for name in ("yarn", "gpt2") for how in (("zero3", "fp32"), ("resident", "bf16"))]


def tensors_of(model):
    """Returns buffers, and tensors that are plain attributes, by name."""
    tensors = dict(model.named_buffers())
    for prefix, module in model.named_modules():
        tensors |= {f"{prefix}.{k}": v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
    return tensors


@pytest.mark.parametrize(("name", "mode", "precision"), LOADED)
def test_a_loaded_model_is_the_one_that_transformers_loads(tmp_path, world, capsys, name, mode, precision):
    """Buffers are the same bit for bit, states at first and late positions are equal, and dskd finds that too."""
    save(tmp_path / "teacher", name)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=dtype).eval()
    reference = tensors_of(base_model(expected))
    teacher = load(tmp_path / "teacher", world, mode=mode, precision=precision)
    printed = capsys.readouterr().err
    assert "compared with transformers' own: computed buffers, and last hidden states of 16 tokens" in printed
    loaded = tensors_of(teacher.decoder.base)
    assert reference.keys() <= loaded.keys()  # longrope keeps the table of late positions that it made when it ran
    for key, tensor in reference.items():
        assert loaded[key].dtype == tensor.dtype, key
        assert torch.equal(loaded[key], tensor), key

    ids = torch.arange(24).view(2, 12) + 3
    for start in (LATE[name], 0) if name in LATE else ():
        positions = torch.arange(start, start + 12).expand(2, 12)
        with torch.no_grad():
            states = base_model(expected)(input_ids=ids, position_ids=positions).last_hidden_state
        error = (teacher.hidden_states(ids, positions) - states).float().norm() / states.float().norm()
        assert error < (0.01 if precision == "bf16" else 1e-5)

    compare_with_transformers(teacher.engine, teacher.decoder, teacher.folder, world, dtype, small=0)
    assert "and what layers 0, " in capsys.readouterr().err
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
