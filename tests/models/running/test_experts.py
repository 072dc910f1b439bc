"""Mixtures of experts under ZeRO-3 on two ranks, whose tokens choose different experts, against transformers."""

import pytest
import torch
from architectures import save_architecture
from rank_jobs import experts_by_ranks
from rank_processes import finish, fork_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dskd.models.structure.base_model import base_model

NAMES = ["deepseek-v3", "mixtral", "qwen3-moe", "gpt-oss", "llama4"]
LENGTHS = [(24, 17), (1, 40)]


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """The folder in which two ranks examined every model with tokens of all lengths."""
    folder = tmp_path_factory.mktemp("experts")
    for name in NAMES:
        save_architecture(folder / name / "teacher", name)
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
