"""What folders hold: keys of a newer transformers, quantised weights, two sets of weights, and what is no decoder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, save_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.folder import ModelFolder, check_model_folder, find_teacher
from dskd.models.model_config import read_model_config
from dskd.models.weights import TensorReader


def _edit(folder, without=(), **keys):
    file = folder / "config.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(values | keys))


def _refusal(folder, **teacher):
    with pytest.raises(UserError) as error:
        find_teacher(Config(workdir=str(folder.parent), teacher={"path": str(folder), **teacher}))
    return str(error.value)


def test_rotations_as_transformers_5_writes_them_are_read(tmp_path):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    _edit(tmp_path, without=("rope_theta", "rope_scaling"), rope_parameters=rope, transformers_version="5.2.0")
    config = ModelFolder(tmp_path, "", "").load_config()
    assert (config.rope_theta, config.rope_scaling) == (500000.0, {"rope_type": "linear", "factor": 4.0})
    values = read_model_config(tmp_path)
    assert values["rope_parameters"] == rope  # for transformers 5
    assert values["rope_theta"] == 500000.0


def test_rotations_by_the_kind_of_a_layer_are_read(tmp_path):
    Gemma3TextConfig(**SHAPE).save_pretrained(tmp_path)
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    _edit(tmp_path, without=("rope_theta", "rope_scaling", "rope_local_base_freq"), rope_parameters=rope)
    config = ModelFolder(tmp_path, "", "").load_config()
    assert (config.rope_theta, config.rope_local_base_freq, config.rope_scaling["factor"]) == (7e5, 2e4, 8.0)
    rope["sliding_attention"] = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 2e4}
    _edit(tmp_path, rope_parameters=rope)
    with pytest.raises(UserError, match="rope_type yarn in layers with a window"):
        read_model_config(tmp_path)


def test_keys_of_a_newer_transformers_that_change_the_function_are_refused(tmp_path, capsys):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    _edit(tmp_path, attention_sink_scale=0.5, unsloth_fixed=True, note="x", transformers_version="5.2.0")
    with pytest.raises(UserError, match=r"written by transformers 5.2.0(.|\n)*attention_sink_scale: 0.5") as error:
        read_model_config(tmp_path)
    assert "unsloth" not in str(error.value)
    _edit(tmp_path, transformers_version="4.40.0")
    read_model_config(tmp_path)
    assert "does not know attention_sink_scale" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4", "fp8"])
def test_quantised_folders_are_refused_when_they_are_found(tmp_path, method):
    save_model(tmp_path / "teacher")
    _edit(tmp_path / "teacher", quantization_config={"quant_method": method})
    assert f"quantised ({method})" in _refusal(tmp_path / "teacher")


def test_block_fp8_is_codes_times_scales(tmp_path):
    save_model(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    codes = tensors[name].to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 3.0], [2.0, 0.25], [1.5, 7.0]])
    save_file(tensors | {name: codes, f"{name}_scale_inv": scales}, file, metadata={"format": "pt"})
    _edit(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [20, 30]})
    reader = TensorReader(tmp_path)
    expected = torch.stack(
        [torch.stack([codes[i, j].float() * scales[i // 20, j // 30] for j in range(32)]) for i in range(48)]
    )
    assert torch.equal(reader.read(name), expected)
    assert f"{name}_scale_inv" not in reader.names
    assert "quantization_config" not in read_model_config(tmp_path)


def test_of_two_sets_of_weights_the_single_file_is_read(tmp_path, capsys):
    save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: 2 * value for key, value in tensors.items()}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(TensorReader(tmp_path).read("model.norm.weight"), theirs["model.norm.weight"])
    assert "model.safetensors is read" in capsys.readouterr().err


def test_what_is_no_decoder_for_text_is_refused_by_name(tmp_path):
    save_model(tmp_path / "teacher")
    folder = tmp_path / "teacher"
    _edit(folder, vision_config={"hidden_size": 8}, architectures=["Gemma3ForConditionalGeneration"])
    assert "Gemma3ForConditionalGeneration is a multimodal model" in _refusal(folder)
    _edit(folder, without=("vision_config",), architectures=["BertForMaskedLM"])
    assert "BertForMaskedLM is no decoder" in _refusal(folder)
    _edit(folder, architectures=None, model_type="nonsense")
    assert "no causal language model of the type 'nonsense'" in _refusal(folder)
    _edit(folder, auto_map={"AutoConfig": "c.C"})
    assert "runs only with teacher.trust_remote_code: true" in _refusal(folder)


def test_adapters_pointers_and_revisions_of_folders_are_refused(tmp_path):
    folder = tmp_path / "teacher"
    save_model(folder)
    assert "teacher.revision: 'main' is of a model of the hub" in _refusal(folder, revision="main")
    shutil.move(folder / "model.safetensors", tmp_path / "kept")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="this is a LoRA adapter; merge it"):
        check_model_folder(folder, named_by="teacher.path")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.safetensors is a git-lfs pointer" in _refusal(folder)


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_a_merged_model_with_an_adapter_config_reads_its_own_weights(tmp_path, world, mode):
    from dskd.models.frozen import load_frozen

    model = save_model(tmp_path / "teacher")
    (tmp_path / "teacher" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "no/such-model", "task_type": "CAUSAL_LM"})
    )
    config = Config(workdir=str(tmp_path), teacher={"path": str(tmp_path / "teacher"), "mode": mode}, precision="fp32")
    teacher = load_frozen(find_teacher(config), config, world)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(teacher.hidden_states(ids), model.model(ids).last_hidden_state)
    teacher.close()
