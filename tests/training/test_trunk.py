"""The shared trunk only saves work: losses, gradients and exports are those of separate models."""

import json

import pytest
import torch
from architectures import save_architecture
from tiny_models import ARCHITECTURES, SHAPE, save_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from dskd.config import Config
from dskd.corpus.sequences import position_ids_of
from dskd.errors import UserError
from dskd.losses.head import Normalizers
from dskd.models.cutting import build_student, find_student
from dskd.models.folder import find_teacher
from dskd.models.trunk import TrunkError, missing_source, trunk_depth
from dskd.training.pair import load_pair

IDS = (torch.arange(48) * 11 % 117).view(2, 24)
STARTS = torch.tensor([[1, 1, *[0] * 8, 1, *[0] * 13], [1, *[0] * 23]], dtype=torch.uint8)


def _config(folder, **sections):
    sections = {"teacher": {}, "student": {}, **sections}
    return Config(
        workdir=str(folder),
        precision="fp32",
        train={"global_batch_size": 2, "micro_batch_size": 2, **sections.pop("train", {})},
        teacher={"path": str(folder / "teacher"), **sections.pop("teacher")},
        student={"layers": 3, "train_layers": 1, **sections.pop("student")},
        loss={"hidden_weight": 0.5, **sections.pop("loss", {})},
        **sections,
    )


def _load(config, world):
    return load_pair(config, world, find_teacher(config), find_student(config), margin=1.0, accumulation_steps=1)


def _step(pair):
    """Returns the loss, its terms, and the gradients by their names in the Hugging Face folder."""
    from deepspeed.utils import safe_get_full_grad

    positions = position_ids_of(STARTS)
    states, inputs = pair.run_teacher(IDS, positions)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, [0, 9, 23]] = mask[1, 23] = False
    senses = {
        "sense_rows": torch.linspace(-1, 1, 64).view(2, 32).bfloat16(),
        "relation_positions": torch.tensor([3, 30]),
        "synonym_rows": torch.tensor([[0, 1], [1, -1]]),
        "antonym_rows": torch.tensor([[1, -1], [-1, -1]]),
        "own_positions": torch.tensor([5]),
        "own_rows": torch.tensor([[1, 0]]),
    }
    loss, terms = pair.engine(
        inputs,
        positions,
        labels=IDS.roll(-1, dims=1),
        loss_mask=mask,
        normalizers=Normalizers(1 / int(mask.sum()), 1 / 3),
        teacher_hidden=states,
        senses=senses,
    )
    pair.engine.backward(loss)
    module = pair.engine.module
    gradients = {
        module.hub_names[name]: safe_get_full_grad(p) for name, p in module.named_parameters() if p.requires_grad
    }
    return loss.detach(), terms, gradients


@pytest.mark.parametrize(("architecture", "recompute"), [*((name, False) for name in ARCHITECTURES), ("llama", True)])
def test_losses_and_gradients_are_those_of_the_separate_path(tmp_path, world, architecture, recompute):
    save_model(tmp_path / "teacher", architecture)
    results = {}
    for mode in ("on", "off"):
        config = _config(
            tmp_path,
            student={"shared_trunk": mode},
            train={"activation_checkpointing": recompute},
            teacher={"mode": "resident" if recompute else "zero3"},
        )
        if mode == "on":
            build_student(config)
        pair = _load(config, world)
        assert len(pair.engine.module.decoder.layers) == (1 if mode == "on" else 3)
        held = sum(p.ds_numel for name, p in pair.engine.module.named_parameters() if "layers" not in name)
        # With a trunk, neither its layers nor the embeddings are loaded: outside of layers, only norm and head.
        assert (held == 120 * 32 + 32) == (mode == "on" or architecture == "qwen2")
        results[mode] = _step(pair)
        pair.engine.destroy()
        pair.teacher.close()
    assert {name.split(".")[2] for name in results["on"][2]} == {"2"}
    torch.testing.assert_close(results["on"], results["off"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [(0, "train_lm_head"), (1, "train_final_norm")])
def test_parameters_outside_the_layers_are_trained_alike_with_a_trunk(tmp_path, world, trained):
    save_model(tmp_path / "teacher")
    results = {}
    for mode in ("on", "off"):
        config = _config(tmp_path, student={"shared_trunk": mode, "train_layers": trained[0], trained[1]: True})
        if mode == "on":
            build_student(config)
        pair = _load(config, world)
        results[mode] = _step(pair)
        pair.engine.destroy()
        pair.teacher.close()
    torch.testing.assert_close(results["on"], results["off"], rtol=1e-5, atol=1e-6)


def _depth(kept=(0, 1, 2, 3), *, same_teacher=True, tied=False, loss=None, mode="zero3", store=(), **student):
    config = Config(
        workdir="w",
        teacher={"path": "t", "mode": mode},
        annotation={"teacher_top_n": 4, "store": store},
        loss=loss or {},
        student={"train_layers": 1, **student},
    )
    no_source = missing_source(config)
    return trunk_depth(config.student, kept=kept, same_teacher=same_teacher, tied=tied, no_source=no_source)


def test_the_trunk_is_the_frozen_layers_that_are_lowest_in_both_models():
    assert _depth() == 3
    assert _depth(train_layers=3) == 1
    assert _depth(train_layers=(1, 3)) == 1
    assert _depth(train_layers=0, train_lm_head=True) == 3  # one layer is left to run
    assert _depth((0, 1, 4, 6)) == 2
    assert _depth(shared_trunk="off") == 0
    assert _depth(tied=True, train_final_norm=True) == 3
    assert _depth(mode="cached", store=("teacher_states", "trunk_states")) == 3
    assert _depth(mode="auto", store=("trunk_states",), loss={"kd_weight": 0.0}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_layers": 4}, "lowest layer is trained"),
        ({"kept": (1, 2)}, "lowest layer is the teacher's layer 1"),
        ({"train_embeddings": True}, "embeddings are trained"),
        ({"tied": True, "train_lm_head": True}, "embeddings are trained"),
        ({"same_teacher": False}, "cut from another teacher"),
        ({"loss": {"kd_weight": 0.0}}, "no term of the loss reads the teacher"),
        ({"mode": "cached"}, "teacher.mode is cached"),
        ({"mode": "auto", "store": ("teacher_states",)}, "annotation.store has no trunk_states"),
    ],
)
def test_there_is_no_trunk_if_it_would_not_be_exact(options, message):
    with pytest.raises(TrunkError, match=message):
        _depth(**options)


def test_layers_whose_shape_depends_on_their_place_are_computed_by_the_student(tmp_path, world, capsys):
    save_architecture(tmp_path / "teacher", "diffllama")  # each layer's attention has a factor of its own
    config = _config(tmp_path, corpus={"packing": "stream", "sequence_length": 32})
    build_student(config)
    pair = _load(config, world)
    assert pair.trunk is None
    assert "a layer's shape depends on its place" in capsys.readouterr().err
    pair.engine.destroy()
    pair.teacher.close()


OTHERS = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=8)),  # scales its embeddings
    "gpt2": lambda: GPT2LMHeadModel(  # adds positions to them
        GPT2Config(vocab_size=120, n_embd=32, n_layer=4, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    ),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_an_architecture_that_changes_the_input_of_layers_is_detected(tmp_path, world, architecture, capsys):
    save_model(tmp_path / "teacher")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "teacher" / name).unlink()
    OTHERS[architecture]().save_pretrained(tmp_path / "teacher")
    sections = {"corpus": {"packing": "stream"}}
    config = _config(tmp_path, **sections)
    build_student(config)
    pair = _load(config, world)
    assert pair.trunk is None
    assert "computes all of its layers: G" in capsys.readouterr().err
    assert len(pair.engine.module.decoder.layers) == 3
    assert _step(pair)[0].isfinite()
    pair.engine.destroy()
    with pytest.raises(UserError, match=r"shared_trunk: on is not possible: G.* changes the states that go into"):
        _load(_config(tmp_path, student={"shared_trunk": "on"}, **sections), world)


def test_a_student_that_is_no_longer_a_copy_is_detected(tmp_path, world):
    from safetensors.torch import load_file, save_file

    save_model(tmp_path / "teacher")
    config = _config(tmp_path, student={"shared_trunk": "on"})
    build_student(config)
    file = tmp_path / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    assert manifest["kind"] == "student"
    with pytest.raises(UserError, match="lowest trained layer computes something different"):
        _load(config, world)
