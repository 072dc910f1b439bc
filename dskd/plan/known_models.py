"""Shapes of models of the Hub that shipped configurations name and whose files need a licence or a network.

They are taken from the models' own config.json; everything that does not change a shape is left out.
"""

from typing import Any

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8192}


def _llama_3(hidden_size: int, layers: int, heads: int, intermediate_size: int) -> dict[str, Any]:
    return {
        **_LLAMA_3,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
    }


_8B = _llama_3(4096, 32, 32, 14_336)
_70B = _llama_3(8192, 80, 64, 28_672)
_405B = _llama_3(16_384, 126, 128, 53_248)
_MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
}

# By name in lower case, with the keys of config.json.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/meta-llama-3-8b": _8B,
    "meta-llama/meta-llama-3-8b-instruct": _8B,
    "meta-llama/meta-llama-3-70b": _70B,
    "meta-llama/meta-llama-3-70b-instruct": _70B,
    "meta-llama/llama-3.1-405b": _405B,
    "meta-llama/llama-3.1-405b-instruct": _405B,
    "mistralai/mistral-7b-v0.1": _MISTRAL_7B,
    "mistralai/mistral-7b-instruct-v0.1": _MISTRAL_7B,
}
