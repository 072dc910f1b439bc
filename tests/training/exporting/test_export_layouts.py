"""Exports of users' models: any stored type, names as on the Hub, both of two tied matrices, an adapter's file."""

import json
from dataclasses import replace

import pytest
import torch
from loaded_pairs import load_models
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, word_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.errors import UserError
from dskd.losses.head import Normalizers
from dskd.models.files.folder import find_teacher
from dskd.students.student import build_student, find_student
from dskd.training.checkpoints import checkpoint
from dskd.training.checkpoints.writing import save_checkpoint
from dskd.training.exporting.export import build_export, write_export
from dskd.training.exporting.rehearsal import rehearse_export

GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}


def _save(folder, config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    word_tokenizer([f"w{index}" for index in range(100)]).save_pretrained(folder)


def _change_tensors(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _without(prefix):
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _config(tmp_path, **changes):
    settings = {
        "workdir": str(tmp_path / "work"),
        "precision": "fp32",
        "teacher": {"path": str(tmp_path / "teacher")},
        "corpus": {"packing": "stream", "sequence_length": 48},
        "student": {"layers": 2, "train_layers": 1},
        "loss": {"sense_weight": 0.0},
        "tracking": {"enabled": False},
        "train": {"learning_rate": 0.01},
    }
    return Config(**(settings | changes))


def _load(config, world):
    build_student(config)
    return load_models(config, world)


def _train_and_export(config, world):
    """Rehearses, takes a step, writes a checkpoint and exports it; returns the trained tensors and the export."""
    pair, student = _load(config, world), find_student(config)
    rehearse_export(pair, student, config, world)
    assert not [*kinds.checkpoint_folder(config).glob(".*")]
    ids = torch.arange(24).view(1, 24) * 11 % 117
    states, inputs = pair.run_teacher(ids)
    total, _ = pair.engine(
        inputs,
        labels=ids.roll(-1, 1),
        loss_mask=torch.ones(1, 24, dtype=torch.bool),
        normalizers=Normalizers(1 / 24, 1.0),
        teacher_hidden=states,
    )
    pair.engine.backward(total)
    pair.engine.step()
    inputs = {"student": student.digest, "shards": "0" * 64, "senses": "0" * 64}
    settings = config.as_dict()
    settings = {key: settings[key] for key in ("loss", "train", "student", "seed", "precision")}
    recipe = Recipe("checkpoint", inputs, settings, find_teacher(config).digest, student.tokenizer_digest)
    facts = {"step": 1, "total_steps": 1, "world_size": 1, "mlflow_run_id": None, "dtype": _dtype(config)}
    save_checkpoint(pair, config, recipe, facts, world)
    pair.engine.destroy()
    build_export(config)
    trained = load_file(checkpoint.latest(config).path / checkpoint.TRAINED_FILE)
    return trained, config.path("export", config.run)


def _dtype(config):
    return {"bf16": "bfloat16", "fp32": "float32"}[config.precision]


@pytest.mark.parametrize(
    ("stored", "precision"), [(torch.bfloat16, "fp32"), (torch.float16, "bf16"), (torch.float32, "bf16")]
)
def test_an_export_has_the_teachers_type_whatever_the_run_computes_in(tmp_path, world, capsys, stored, precision):
    """Nearly every model on the Hub is stored in bf16, and many machines compute in fp32."""
    _save(tmp_path / "teacher", LlamaConfig(**SHAPE), stored)
    trained, export = _train_and_export(_config(tmp_path, precision=precision), world)
    student = load_file(tmp_path / "work" / "student" / "model.safetensors")
    exported = load_file(export / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {stored}
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained[name].to(stored) if name in trained else student[name]), name
    assert any(not torch.equal(exported[name], student[name]) for name in trained)
    facts = json.loads((export / "manifest.json").read_text())["facts"]
    printed = capsys.readouterr()
    if (stored, precision) == (torch.bfloat16, "fp32"):
        assert facts["logits_error"] < 1e-5 < facts["rounding_error"] < 0.02
        assert "trained tensors are rounded to bfloat16" in printed.out + printed.err
    if stored == torch.float32:
        assert facts["rounding_error"] == 0


def test_a_folder_that_leaves_out_the_base_models_prefix_is_exported_with_its_own_names(tmp_path, world):
    """As GPT-2 on the Hub does."""
    prefix = "transformer."
    _save(tmp_path / "teacher", GPT2Config(**GPT2))
    _change_tensors(tmp_path / "teacher", _without(prefix))
    trained, export = _train_and_export(_config(tmp_path), world)
    student = load_file(tmp_path / "work" / "student" / "model.safetensors")
    exported = load_file(export / "model.safetensors")
    assert trained
    assert exported.keys() == student.keys()
    assert not any(name.startswith(prefix) for name in exported)
    loaded = AutoModelForCausalLM.from_pretrained(export).state_dict()
    for name, tensor in trained.items():
        assert torch.equal(loaded[prefix + name], tensor), name


def test_a_stale_copy_of_a_tied_matrix_is_not_exported(tmp_path, world):
    _save(tmp_path / "teacher", Qwen2Config(**SHAPE, tie_word_embeddings=True))
    both = "model.embed_tokens.weight", "lm_head.weight"
    _change_tensors(tmp_path / "teacher", lambda tensors: {**tensors, both[1]: tensors[both[0]].clone()})
    config = _config(tmp_path, student={"layers": 2, "train_layers": 1, "train_embeddings": True})
    trained, export = _train_and_export(config, world)
    (name,) = set(both) & set(trained)
    exported = load_file(export / "model.safetensors")
    assert set(both) & set(exported) == {name}
    loaded = AutoModelForCausalLM.from_pretrained(export)
    for matrix in (loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight):
        assert torch.equal(matrix, trained[name])


def test_an_adapters_file_is_left_out(tmp_path, world):
    """With it transformers would load the adapter's base model in place of the export."""
    _save(tmp_path / "teacher", LlamaConfig(**SHAPE))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "r": 8}
    config = _config(tmp_path)
    build_student(config)
    (tmp_path / "teacher" / "adapter_config.json").write_text(json.dumps(adapter))
    student = find_student(config)
    (student.path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "target").mkdir()
    write_export(student, {}, tmp_path / "target")
    assert not (tmp_path / "target" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "target")


@pytest.mark.parametrize("trusted", [True, False])
def test_a_models_own_code_is_exported_where_it_is_trusted(tmp_path, trusted):
    _save(tmp_path / "teacher", LlamaConfig(**SHAPE))
    config = _config(tmp_path)
    build_student(config)
    student = replace(find_student(config), trust_remote_code=trusted)
    (student.path / "modeling_own.py").write_text("raise ImportError")
    (tmp_path / "target").mkdir()
    write_export(student, {}, tmp_path / "target")
    assert (tmp_path / "target" / "modeling_own.py").exists() == trusted


def test_a_trained_value_that_float16_cannot_hold_is_kept_in_float32(tmp_path):
    _save(tmp_path / "teacher", LlamaConfig(**SHAPE), torch.float16)
    config = _config(tmp_path)
    build_student(config)
    name = "model.layers.1.mlp.down_proj.weight"
    trained = {name: torch.full((32, 48), 1e5)}
    (tmp_path / "target").mkdir()
    write_export(find_student(config), trained, tmp_path / "target")
    exported = load_file(tmp_path / "target" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto")
    assert torch.equal(loaded.state_dict()[name], trained[name])


def test_what_would_fail_at_the_end_fails_before_the_first_step(tmp_path, world):
    _save(tmp_path / "teacher", LlamaConfig(**SHAPE))
    config = _config(tmp_path)
    pair, student = _load(config, world), find_student(config)
    # As if a killed process had left a file.
    scratch = kinds.checkpoint_folder(config) / checkpoint.REHEARSAL
    scratch.mkdir(parents=True)
    (scratch / "model-00001-of-00009.safetensors").write_bytes(b"x")
    rehearse_export(pair, student, config, world)
    # Wrong rotations: right between neighbours, and wrong at larger distances.
    rotary = pair.teacher.decoder.base.rotary_emb
    right = rotary.inv_freq.clone()
    rotary.inv_freq.mul_(1.004)
    own = pair.engine.module.decoder.base.rotary_emb
    own.inv_freq.mul_(1.004)
    with pytest.raises(UserError, match=r"logits differ .* at position \d+, more than .*so training does not start"):
        rehearse_export(pair, student, config, world)
    rotary.inv_freq.copy_(right)
    own.inv_freq.copy_(right)
    # A tensor that is not trained is missing.
    _change_tensors(
        student.path, lambda tensors: {name: t for name, t in tensors.items() if "layers.0.mlp.down_proj" not in name}
    )
    with pytest.raises(
        UserError, match=r"fills these in at random.*so training does not start[^$]*layers.0.mlp.down_proj"
    ):
        rehearse_export(pair, student, config, world)
    assert not scratch.exists()
    pair.engine.destroy()


def test_in_bf16_a_rotation_table_that_is_wrong_at_far_positions_is_distinguished_from_rounding(tmp_path, world):
    _save(tmp_path / "teacher", LlamaConfig(**SHAPE | {"max_position_embeddings": 2048}))
    corpus = {"packing": "stream", "sequence_length": 2048}
    config = _config(tmp_path, precision="bf16", corpus=corpus, student={"layers": 4, "train_layers": 1})
    pair = _load(config, world)
    rehearse_export(pair, find_student(config), config, world)
    for decoder in (pair.teacher.decoder, pair.engine.module.decoder):
        decoder.base.rotary_emb.inv_freq.mul_(1.004)
    with pytest.raises(UserError, match=r"logits differ"):
        rehearse_export(pair, find_student(config), config, world)
    pair.engine.destroy()
