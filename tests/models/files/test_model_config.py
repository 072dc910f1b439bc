"""Model folders: keys of newer transformers, quantised weights, two sets of weights, models that are not decoders."""

import importlib.util
import json
import shutil

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, save_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder, check_model_folder, find_teacher
from dskd.models.files.model_config import read_model_config
from dskd.models.files.weights import TensorReader
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.stored_names import check_stored_tensors


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
    config = ModelFolder(tmp_path, "").load_config()
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
    config = ModelFolder(tmp_path, "").load_config()
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
    read_model_config(tmp_path, named_by="teacher.path")
    read_model_config(tmp_path)
    assert capsys.readouterr().err.count("does not know attention_sink_scale") == 1  # the file is named once


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


def test_models_that_are_not_text_decoders_are_refused_by_name(tmp_path):
    save_model(tmp_path / "teacher")
    folder = tmp_path / "teacher"
    _edit(folder, vision_config={"hidden_size": 8}, architectures=["Gemma3ForConditionalGeneration"])
    assert "Gemma3ForConditionalGeneration is a multimodal model" in _refusal(folder)
    _edit(folder, without=("vision_config",), architectures=["BertForMaskedLM"])
    assert "BertForMaskedLM does not predict the next token" in _refusal(folder)
    _edit(folder, architectures=None, model_type="nonsense")
    assert "no causal language model of the type 'nonsense'" in _refusal(folder)
    _edit(folder, auto_map={"AutoConfig": "c.C"})
    assert "runs only with teacher.trust_remote_code: true" in _refusal(folder)


def test_adapters_pointers_and_revisions_of_folders_are_refused(tmp_path):
    folder = tmp_path / "teacher"
    save_model(folder)
    assert "teacher.revision: 'main' is a revision of a model on the Hub" in _refusal(folder, revision="main")
    shutil.move(folder / "model.safetensors", tmp_path / "kept")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="this is a LoRA adapter; merge it"):
        check_model_folder(folder, named_by="teacher.path")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.safetensors: this is only a pointer of git" in _refusal(folder)


def test_every_key_that_this_transformers_writes_is_known_to_it(tmp_path, capsys):
    refused = {}
    for name, architecture in ARCHITECTURES.items():
        if name == "recurrent-gemma":  # the file has positions that it does not use
            continue
        architecture.config().save_pretrained(tmp_path)
        _edit(tmp_path, transformers_version="5.2.0")
        try:
            read_model_config(tmp_path)
        except UserError as error:
            refused[name] = str(error)
    assert refused == {}
    assert "does not know" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("qwen3_moe", "head_dim", 8),
        ("glm4_moe", "head_dim", 8),
        ("deepseek_v3", "qk_head_dim", 16),
        ("deepseek_v3", "head_dim", 8),
        ("gpt_oss", "attention_bias", True),
        ("cohere2", "sliding_window_pattern", 4),
        ("gemma3_text", "sliding_window_pattern", 6),
        ("modernbert-decoder", "sliding_window", 64),
        ("dbrx", "num_key_value_heads", 2),
    ],
)
def test_keys_that_only_code_reads_are_known(tmp_path, model_type, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.2.0"}))
    _edit(tmp_path, **{key: value})
    assert read_model_config(tmp_path)[key] == value
    _edit(tmp_path, attention_sink_scale=0.5)
    with pytest.raises(UserError, match="attention_sink_scale"):
        read_model_config(tmp_path)


def test_other_declarations_of_quantised_weights_count_too(tmp_path):
    folder = tmp_path / "teacher"
    save_model(folder)
    _edit(folder, compression_config={"quant_method": "sparseml"})
    assert "quantised (compression_config: sparseml)" in _refusal(folder)
    _edit(folder, without=("compression_config",))
    (folder / "hf_quant_config.json").write_text("{}")
    assert "quantised (there is a hf_quant_config.json)" in _refusal(folder)


def test_a_tied_matrix_under_the_name_of_the_output_alone_is_refused(tmp_path):
    """transformers leaves such a model without embeddings."""
    save_model(tmp_path, "qwen2")
    file, name = tmp_path / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors[name].clone()}, file, metadata={"format": "pt"})
    folder = ModelFolder(tmp_path, "")
    check_stored_tensors(empty_model(folder), TensorReader(tmp_path), folder)
    save_file({**{k: v for k, v in tensors.items() if k != name}, "lm_head.weight": tensors[name]}, file)
    with pytest.raises(UserError, match=rf"no tensor {name}, to which .* only lm_head.weight"):
        check_stored_tensors(empty_model(folder), TensorReader(tmp_path), folder)


@pytest.mark.parametrize("method", ["read", "shape", "stored_type"])
def test_a_tensor_that_its_file_lacks_is_named(tmp_path, method):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"one\.safetensors: b, which model\.safetensors\.index\.json says"):
        getattr(TensorReader(tmp_path), method)("b")


def test_tokenizers_that_cannot_be_loaded_are_refused_with_the_reason(tmp_path):
    folder = tmp_path / "teacher"
    save_model(folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:-20])
    assert f"{file} may be damaged" in _refusal(folder)
    file.write_text('{"version": "1.0", "model": {"type": "unheard-of"}}')
    assert f"{file} may be damaged" in _refusal(folder)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_missing_sentencepiece_is_reported_first(tmp_path, name):
    folder = tmp_path / "teacher"
    save_model(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / name).write_bytes(b"x")
    message = _refusal(folder)
    assert message.endswith(f"its {name} needs two packages: pip install sentencepiece protobuf")
    assert len(message) < 300


def test_a_tokenizer_with_code_of_its_own_names_the_setting(tmp_path):
    folder = tmp_path / "teacher"
    save_model(folder)
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text("raise SystemExit(3)")
    assert "teacher.trust_remote_code: true" in _refusal(folder)


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_a_merged_model_with_an_adapter_config_reads_its_own_weights(tmp_path, world, mode):
    from dskd.models.running.frozen import load_frozen

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
