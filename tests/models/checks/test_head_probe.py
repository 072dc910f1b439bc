"""Tests that the step from products to logits is found by running a model's own forward, or the model is refused."""

from pathlib import Path

import architectures
import pytest
import torch
from tiny_models import SHAPE, save_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MptConfig

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.checks.head_probe import find_logit_transform
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import load_frozen
from dskd.models.structure.output_head import LogitTransform

FOLDER = ModelFolder(Path("teacher"), "")


def _empty(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architectures.ARCHITECTURES[name].config())


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("gemma2", LogitTransform(cap=5.0)),
        ("recurrent-gemma", LogitTransform(cap=30.0)),
        ("cohere", LogitTransform(0.0625)),
        ("granite", LogitTransform(0.25)),
        ("falcon-h1", LogitTransform(0.5)),
    ],
)
def test_scales_and_caps_are_found_before_there_are_weights_and_give_the_models_own_logits(name, transform):
    assert find_logit_transform(_empty(name), FOLDER) == transform
    model = architectures.random_model(name).double()
    head, seen = model.get_output_embeddings(), []
    with torch.no_grad():
        head.weight.mul_(20)  # with logits around the cap
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        expected = model(torch.arange(24)[None], use_cache=False).logits
        logits = transform.apply(F.linear(seen[0], head.weight))
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert (logits - F.linear(seen[0], head.weight)).abs().max() > 1


@pytest.mark.parametrize("name", ["opt", "gemma3", "mixtral", "gpt-oss"])
def test_heads_of_every_structure_are_tried(name):
    model = _empty(name)
    before = dict(model.named_modules())
    assert find_logit_transform(model, FOLDER) == LogitTransform()
    assert dict(model.named_modules()) == before


def test_a_key_that_the_architecture_ignores_changes_nothing():
    model_config = MptConfig(vocab_size=120, d_model=32, n_heads=4, n_layers=1, max_seq_len=32, logit_scale=0.3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    assert find_logit_transform(model, FOLDER) == LogitTransform()


class _Changed(LlamaForCausalLM):
    """A model that does something to its states or logits, as code from elsewhere may."""

    change_states = change_logits = staticmethod(lambda tensor: tensor)

    def forward(self, input_ids, **options):
        states = self.model(input_ids=input_ids, **options).last_hidden_state
        output = type("Output", (), {})()
        output.logits = self.change_logits(self.lm_head(self.change_states(states)))
        return output


def test_states_that_are_scaled_before_the_product_are_known_by_minicpms_key():
    class MiniCPM(_Changed):
        change_states = staticmethod(lambda states: states / (32 / 8))

    model = MiniCPM(LlamaConfig(**SHAPE, dim_model_base=8))
    assert find_logit_transform(model, FOLDER) == LogitTransform(0.25)


CHANGES = {
    "a shift": lambda logits: logits + 1,
    "a slight scale": lambda logits: logits * 1.005,
    "a high cap": lambda logits: 5000 * torch.tanh(logits / 5000),
    "another base": lambda logits: logits.log_softmax(-1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_refused(change):
    model = type("Model", (_Changed,), {"change_logits": staticmethod(CHANGES[change])})(LlamaConfig(**SHAPE))
    with pytest.raises(UserError, match="teacher: Model: its logits are neither the products"):
        find_logit_transform(model, FOLDER)


def test_a_cap_that_the_model_applies_otherwise_is_refused_by_name():
    model = type("Model", (_Changed,), {"change_logits": staticmethod(lambda logits: logits.clamp(-30, 30))})(
        LlamaConfig(**SHAPE, final_logit_softcapping=30.0)
    )
    with pytest.raises(UserError, match=r"capped by final_logit_softcapping: 30\.0 as config\.json says"):
        find_logit_transform(model, FOLDER)


def test_a_bias_is_refused_before_there_are_weights():
    with pytest.raises(UserError, match="adds a bias to its logits"):
        find_logit_transform(_empty("phi"), FOLDER)


def test_a_model_whose_head_cannot_be_tried_is_refused(tmp_path, world):
    save_model(tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").unlink()
    model_config = MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path / "teacher")
    config = Config(workdir=str(tmp_path), teacher={"path": str(tmp_path / "teacher")}, precision="fp32")
    with pytest.raises(UserError, match=r"computes its logits from more than the last hidden state \(cache_params\)"):
        load_frozen(find_teacher(config), config, world)
