"""Models under ZeRO-3 against transformers' own, and how their parameters are shared out over the ranks."""

import json

import pytest
import torch
from architectures import save_architecture
from loaded_models import states_and_logits
from rank_jobs import held_by_ranks
from rank_processes import finish, fork_ranks
from tiny_models import ARCHITECTURES, save_model
from transformers import AutoModelForCausalLM

from dskd.config import Config, StudentConfig
from dskd.errors import UserError
from dskd.senses.states import states_of

IDS = torch.arange(24).view(2, 12)


def _config(tmp_path, teacher=None, **sections):
    source = {"path": str(tmp_path / "teacher"), **(teacher or {})}
    return Config(workdir=str(tmp_path), teacher=source, precision="fp32", **sections)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_frozen_model_computes_what_transformers_does_in_every_mode(tmp_path, world, architecture):
    from dskd.models.files.folder import find_teacher
    from dskd.models.running.frozen import load_frozen

    expected = save_model(tmp_path / "teacher", architecture)
    with torch.no_grad():
        output = expected(IDS, output_hidden_states=True)
    results = {}
    for mode in ("zero3", "resident"):
        config = _config(tmp_path, {"mode": mode})
        teacher = load_frozen(find_teacher(config), config, world)
        assert (teacher.vocab_size, teacher.hidden_size, teacher.device) == (120, 32, world.device)
        hidden, logits = results[mode] = teacher.read(IDS, None, states_and_logits)
        torch.testing.assert_close(hidden, output.hidden_states[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, output.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(teacher.hidden_states(IDS), hidden)
        module = getattr(teacher.engine, "module", teacher.engine)
        teacher.close()
        # Nothing refers to memory that the weights had, whatever refers to the weights.
        assert not any(weight.numel() for weight in module.parameters())
        assert not any(getattr(weight, "ds_tensor", weight).numel() for weight in module.parameters())
        config = _config(tmp_path, {"mode": mode})
        bare = load_frozen(find_teacher(config), config, world, with_head=False)
        assert torch.equal(bare.hidden_states(IDS), hidden)
        bare.close()
    for one, other in zip(*results.values(), strict=True):
        assert torch.equal(one, other)


def test_a_frozen_model_has_no_dropout_and_no_gradients_in_either_mode(tmp_path, world):
    import json

    from dskd.models.files.folder import find_teacher
    from dskd.models.running.frozen import load_frozen

    save_model(tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.5}))
    for mode in ("zero3", "resident"):
        config = _config(tmp_path, {"mode": mode})
        teacher = load_frozen(find_teacher(config), config, world)
        module = getattr(teacher.engine, "module", teacher.engine)
        assert module.decoder.base.config.attention_dropout == 0.0
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not teacher.hidden_states(IDS).requires_grad
        teacher.close()


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_missing_and_misshapen_weights_are_all_named(tmp_path, world, mode):
    from safetensors.torch import load_file, save_file

    from dskd.models.files.folder import find_teacher
    from dskd.models.running.frozen import load_frozen

    save_model(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, file, metadata={"format": "pt"})
    config = _config(tmp_path, {"mode": mode})
    with pytest.raises(UserError) as error:
        load_frozen(find_teacher(config), config, world)
    assert "there is no tensor model.layers.2.mlp.up_proj.weight" in str(error.value)
    assert "model.norm.weight has shape [5], config.json asks for [32]" in str(error.value)


def test_states_that_are_not_finite_are_refused(tmp_path, world):
    from safetensors.torch import load_file, save_file

    from dskd.corpus.sequences import TokenBatch
    from dskd.models.files.folder import find_teacher
    from dskd.models.running.frozen import load_frozen

    save_model(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][5] = torch.nan  # a token of the first sequence, that spoils all of it
    save_file(tensors, file, metadata={"format": "pt"})
    config = _config(tmp_path)
    teacher = load_frozen(find_teacher(config), config, world)
    has_target = torch.ones(2, 12, dtype=torch.bool)
    batch = TokenBatch(IDS, None, has_target, torch.zeros(2, 12, dtype=torch.uint8), 24)
    with pytest.raises(UserError, match=r"position 0 of sequence 40 is not finite, nor are those of 11 more positions"):
        states_of(teacher, batch, 40)
    has_target[0] = False  # these are not used
    assert states_of(teacher, batch, 40).shape == (2, 12, 32)
    teacher.close()


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_a_model_that_scales_its_logits_is_read_with_its_scale(tmp_path, world, mode):
    from dskd.models.files.folder import find_teacher
    from dskd.models.running.frozen import load_frozen

    model = save_architecture(tmp_path / "teacher", "cohere")
    config = _config(tmp_path, {"mode": mode}, corpus={"sequence_length": 32})
    teacher = load_frozen(find_teacher(config), config, world)
    with torch.no_grad():
        torch.testing.assert_close(teacher.read(IDS, None, states_and_logits)[1], model(IDS).logits)
    teacher.close()


def _chosen(model, **settings):
    from dskd.models.structure.trained import choose_trained

    trained = {id(parameter) for parameter in choose_trained(model, StudentConfig().model_copy(update=settings))}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in trained}


def test_only_what_the_config_names_is_trained(tmp_path):
    save_model(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    last_two = _chosen(model, train_layers=2)
    assert {name.split(".")[2] for name in last_two} == {"2", "3"}
    assert {name.split(".")[2] for name in _chosen(model, train_layers=(0, 3))} == {"0", "3"}
    assert {name.split(".")[2] for name in _chosen(model, train_layers="all")} == {"0", "1", "2", "3"}
    extra = _chosen(model, train_layers=0, train_final_norm=True, train_lm_head=True, train_embeddings=True)
    assert extra == {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 4 * 9


def test_a_tied_head_is_trained_with_its_embeddings(tmp_path):
    save_model(tmp_path / "teacher", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert _chosen(model, train_layers=0, train_lm_head=True) == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"train_layers": 0}, "nothing would be trained"), ({"train_layers": (9,)}, "layers 0 to 3")],
)
def test_nothing_to_train_is_refused(tmp_path, settings, message):
    save_model(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=message):
        _chosen(model, **settings)


def test_on_two_ranks_each_holds_half_of_the_teacher(tmp_path):
    model = save_model(tmp_path / "teacher")
    finish(fork_ranks(held_by_ranks, tmp_path, ranks=2), 120)
    ranks = json.loads((tmp_path / "held.json").read_text())
    total = sum(parameter.numel() for parameter in model.parameters())  # the output matrix too
    for rank in ranks:
        assert rank["all"] == total
        assert rank["held"] == pytest.approx(total / 2, rel=0.01)
        assert rank["gathered"] == 0  # after the forward pass nothing large stays whole
        assert rank["devices"] == ["cpu"]
    with torch.no_grad():
        for rank in range(2):
            output = model(torch.arange(24).view(2, 12) + rank, output_hidden_states=True)
            assert ranks[rank]["sum"] == pytest.approx(float(output.hidden_states[-1].double().sum()), rel=1e-4)
            assert ranks[rank]["logits"] == pytest.approx(float(output.logits.double().abs().sum()), rel=1e-4)
