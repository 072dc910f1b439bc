"""Mixtures of experts under ZeRO-3 on two ranks, whose tokens choose different experts, against transformers."""

import pytest
import torch
from rank_jobs import experts_by_ranks
from rank_processes import finish, fork_ranks
from safetensors.torch import load_file
from test_loading_buffers import CONFIGS, MHA, save
from transformers import AutoModelForCausalLM, Dots1Config, Glm4MoeConfig, MixtralConfig, Qwen3MoeConfig

from dskd.models.stored_names import base_model

EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
CONFIGS |= {
    "glm4_moe": lambda: Glm4MoeConfig(**MHA, **EXPERTS, head_dim=8),
    "dots1": lambda: Dots1Config(**MHA, **EXPERTS, head_dim=8),
    "mixtral": lambda: MixtralConfig(**MHA, num_local_experts=8),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **MHA, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


NAMES = ["glm4_moe", "deepseek_v3", "dots1", "mixtral", "qwen3_moe"]
LENGTHS = [(24, 17), (1, 40)]


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """The folder in which two ranks examined every model with tokens of all lengths."""
    folder = tmp_path_factory.mktemp("experts")
    for name in NAMES:
        save(folder / name / "teacher", name)
    finish(fork_ranks(experts_by_ranks, folder, NAMES, LENGTHS, ranks=2), 240)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(LENGTHS)), ids=map(str, LENGTHS))
@pytest.mark.parametrize("name", NAMES)
def test_each_rank_runs_its_own_experts(examined, name, number):
    folder = examined / name
    model = base_model(AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval())
    for rank, length in enumerate(LENGTHS[number]):
        ids = (torch.arange(length)[None] * 7 + 3 + 31 * rank) % 120
        states = model(input_ids=ids).last_hidden_state
        own_states = load_file(folder / f"states-{number}-{rank}.safetensors")["states"]
        torch.testing.assert_close(own_states, states.detach(), rtol=1e-4, atol=1e-5)
        (states.square().sum() / 2).backward()
    gradients = load_file(folder / f"gradients-{number}.safetensors")
    expected = {key: p.grad for key, p in model.named_parameters() if "layers.3." in key}
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        expected = torch.zeros_like(gradients[key]) if gradient is None else gradient
        torch.testing.assert_close(gradients[key], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1))
