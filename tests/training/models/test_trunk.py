"""The shared trunk only saves work: losses, gradients and exports are those of separate models."""

import itertools
import json

import pytest
import torch
from architectures import save_architecture
from loaded_pairs import load_models
from packed_documents import IDS, STARTS
from tiny_models import SHAPE, save_model
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
from dskd.models.structure.trunk import TrunkError, trunk_depth
from dskd.shards import StoredStates
from dskd.students.student import build_student, find_student
from dskd.training.models.pair import starting_depth
from dskd.training.models.teacher_source import TeacherSource
from dskd.training.models.trunk_check import run_trunk_once


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


@pytest.mark.parametrize(
    ("architecture", "spacing", "trained"),
    [
        ("llama", "ends", {"layers.2."}),
        ("qwen2", "ends", {"layers.2."}),
        ("qwen2", "first", {"layers.2."}),
        ("mistral", "first", {"lm_head.weight", "model.norm.weight"}),
    ],
)
def test_losses_and_gradients_are_those_of_the_separate_path(tmp_path, world, architecture, spacing, trained):
    """With the teacher's last layer above the trunk and with the next one; with a resident teacher and activations that
    are recomputed, with tied embeddings, and without trained layers.
    """
    save_model(tmp_path / "teacher", architecture)
    outside = {"train_layers": 0, "train_lm_head": True, "train_final_norm": True}
    results = {}
    for mode in ("on", "off"):
        config = _config(
            tmp_path,
            student={"spacing": spacing, "shared_trunk": mode, **(outside if architecture == "mistral" else {})},
            train={"activation_checkpointing": architecture == "llama"},
            teacher={"mode": "resident" if architecture == "llama" else "zero3"},
        )
        if mode == "on":
            build_student(config)
        pair = load_models(config, world)
        assert len(pair.engine.module.decoder.layers) == (1 if mode == "on" else 3)
        held = sum(p.ds_numel for name, p in pair.engine.module.named_parameters() if "layers" not in name)
        # With a trunk, neither its layers nor the embeddings are loaded: outside of layers, only norm and head, and the
        # teacher's output matrix if the student's is trained.
        matrices = 2 if "lm_head.weight" in trained else 1
        assert (held == matrices * 120 * 32 + 32) == (mode == "on" or architecture == "qwen2")
        results[mode] = _step(pair)
        pair.engine.destroy()
        pair.teacher.close()
    gradients = results["on"][2]
    assert {next((part for part in trained if part in name), name) for name in gradients} == trained
    torch.testing.assert_close(results["on"], results["off"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "mode", "spacing"),
    [
        ("llama", "resident", "ends"),
        ("llama", "resident", "first"),
        ("mistral", "zero3", "ends"),
        ("qwen2", "zero3", "ends"),
    ],
)
def test_the_trunk_that_runs_once_computes_what_transformers_computes(tmp_path, world, architecture, mode, spacing):
    whole = save_model(tmp_path / "teacher", architecture)
    config = _config(tmp_path, teacher={"mode": mode}, corpus={"sequence_length": 64}, student={"spacing": spacing})
    build_student(config)
    # The layer above the trunk, which has two, is the teacher's next one or its last.
    whole.model.layers = whole.model.layers[:2].append(whole.model.layers[{"first": 2, "ends": 3}[spacing]])
    whole.model.norm = torch.nn.Identity()
    trunk, expected = run_trunk_once(find_student(config), config, world, 2)
    assert trunk.depth == 2
    assert trunk.probe["position_ids"].max() == 63
    with torch.no_grad():
        states = whole(**trunk.probe, output_hidden_states=True, use_cache=False).hidden_states[2]
        ids = torch.arange(1, 65)[None] * 7 % 120
        together = whole(ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(trunk.probe_states, states)
    assert [twin.position_ids is None for twin in expected] == [False, True]
    torch.testing.assert_close(expected[1].run.input, together[2])
    torch.testing.assert_close(expected[1].run.output, together[3])


def _depth(kept=(0, 1, 2, 3), *, same_teacher=True, tied=False, loss=None, mode="zero3", store=(), **student):
    config = Config(
        workdir="w",
        teacher={"path": "t", "mode": mode},
        annotation={"teacher_top_n": 4, "store": store},
        loss=loss or {},
        student={"train_layers": 1, **student},
    )
    no_source = TeacherSource.planned(config).missing_trunk
    return trunk_depth(config.student, kept=kept, same_teacher=same_teacher, tied=tied, no_source=no_source)


def _choices(count):
    """All non-empty choices of `count` numbers from 0, ascending."""
    return [choice for size in range(1, count + 1) for choice in itertools.combinations(range(count), size)]


def test_a_run_starts_from_stored_states_only_if_its_frozen_layers_compute_them():
    """Every student of a teacher of four layers, and every choice of trained layers, with the shards of every other.

    The states that enter a student's layer d are those of its layers below, so they are the stored ones, of the
    teacher's layers 0 to d - 1, if these are the same layers, and not trained.
    """
    depths = {}
    for kept in _choices(4):
        for trained in _choices(len(kept)):
            try:
                depths[kept, trained] = _depth(kept, layers=kept, train_layers=trained)
            except TrunkError:
                depths[kept, trained] = 0
    assert sorted(set(depths.values())) == [0, 1, 2, 3]
    shared = {(kept, trained): depth for (kept, trained), depth in depths.items() if depth}
    for d in range(1, 4):
        stored = StoredStates(("trunk_states",), "float32", 8, d)
        for (kept, trained), depth in shared.items():
            computes_them = kept[:d] == tuple(stored.trunk_layers) and d < len(kept) and min(trained) >= d
            if computes_them:
                assert starting_depth(stored, depth, count=len(kept)) == d
            else:
                with pytest.raises(TrunkError, match=rf"a step would compute {len(kept) - depth} of its {len(kept)} l"):
                    starting_depth(stored, depth, count=len(kept))


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
        ({"train_layers": "all"}, "lowest layer is trained"),
        ({"kept": (1, 2)}, "lowest layer is the teacher's layer 1"),
        ({"train_embeddings": True}, "embeddings are trained"),
        ({"tied": True, "train_lm_head": True}, "embeddings are trained"),
        ({"same_teacher": False}, "cut from another teacher"),
        ({"loss": {"kd_weight": 0.0}}, "no term of the loss reads the teacher"),
        ({"mode": "cached"}, "no teacher is loaded, and the shards have no trunk_states"),
        ({"mode": "auto", "store": ("teacher_states",)}, "no teacher is loaded, and the shards have no trunk_states"),
    ],
)
def test_there_is_no_trunk_if_it_would_not_be_exact(options, message):
    with pytest.raises(TrunkError, match=message):
        _depth(**options)


def test_layers_whose_shape_depends_on_their_place_are_computed_by_the_student(tmp_path, world, capsys):
    save_architecture(tmp_path / "teacher", "diffllama")  # each layer's attention has a factor of its own
    # So its last layer cannot be another one of the student, either.
    stream = {"packing": "stream", "sequence_length": 32}
    with pytest.raises(UserError, match=r"keep others, for example the lowest ones \(student\.spacing: first\)"):
        build_student(_config(tmp_path, corpus=stream))
    config = _config(tmp_path, corpus=stream, student={"spacing": "first"})
    build_student(config)
    pair = load_models(config, world)
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


def _config_of_another(tmp_path, architecture, shared_trunk):
    """Returns a config whose teacher is one of `OTHERS`."""
    save_model(tmp_path / "teacher")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "teacher" / name).unlink()
    OTHERS[architecture]().save_pretrained(tmp_path / "teacher")
    config = _config(tmp_path, student={"shared_trunk": shared_trunk}, corpus={"packing": "stream"})
    build_student(config)
    return config


def test_an_architecture_that_changes_the_input_of_layers_is_detected(tmp_path, world, capsys):
    pair = load_models(_config_of_another(tmp_path, "gemma", "auto"), world)
    assert pair.trunk is None
    assert "computes all of its layers: Gemma" in capsys.readouterr().err
    assert len(pair.engine.module.decoder.layers) == 3
    assert _step(pair)[0].isfinite()
    pair.engine.destroy()


def test_a_trunk_that_the_config_demands_is_refused_if_it_would_not_be_exact(tmp_path, world):
    config = _config_of_another(tmp_path, "gpt2", "on")
    with pytest.raises(UserError, match=r"shared_trunk: on is not possible: GPT2.* changes the states that go into"):
        load_models(config, world)


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
        load_models(config, world)
