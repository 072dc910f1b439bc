"""Toy models with buffers and rotary tables of many kinds, saved with random buffers, and loaded as teachers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import SHAPE, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
)

from dskd.config import Config
from dskd.distributed.world import World
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import FrozenModel, load_frozen

MHA = {**SHAPE, "num_key_value_heads": 4, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.1, 3.7, 9.3, 30.1]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "yarn": lambda: LlamaConfig(**{**SHAPE, "max_position_embeddings": 256}, rope_scaling=YARN),
    "llama3": lambda: LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 4096},
        rope_scaling={**LLAMA3, "original_max_position_embeddings": 64},
    ),
    "longrope": lambda: Phi3Config(
        **{**MHA, "max_position_embeddings": 4096}, original_max_position_embeddings=64, rope_scaling=LONGROPE
    ),
    "gemma3": lambda: Gemma3TextConfig(**MHA, head_dim=8),
    "bloom": lambda: BloomConfig(vocab_size=120, hidden_size=32, n_layer=3, n_head=4),
    "gpt2": lambda: GPT2Config(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "deepseek_v3": lambda: DeepseekV3Config(
        **MHA,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}


def save(folder: Path, name: str) -> None:
    """Writes a random model of :data:`CONFIGS` with its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    stored = set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
        for key, buffer in model.named_buffers():
            if key in stored:
                buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    word_tokenizer([f"w{index}" for index in range(100)]).save_pretrained(folder)


def load(folder: Path, world: World, *, mode: str = "zero3", precision: str = "bf16") -> FrozenModel:
    """Loads a model as a teacher."""
    config = Config(
        workdir=str(folder.parent),
        teacher={"path": str(folder), "mode": mode},
        precision=precision,
        corpus={"packing": "stream", "sequence_length": 32},
    )
    return load_frozen(find_teacher(config), config, world)


def states_and_logits(hidden: torch.Tensor, head: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a model's last hidden states and its logits, for `FrozenModel.read`."""
    return hidden, head.logits(hidden)
