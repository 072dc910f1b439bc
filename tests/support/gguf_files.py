"""Small GGUF files with random models, and the models and tokenizers that they should become."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "The opposite of hot is cold, and the opposite of cold is hot.",
    "In 2026 the sum was 1234567.89; don't they'll say it's more?",
    "a\tb\n\n  c   d\r\n",
    "Grüße aus Köln 東京 🙂 e\u0301",
]
_WIDTH, _INNER, _HEADS, _SHARED_HEADS, _LAYERS = 64, 96, 4, 2, 3
# The names of a layer's modules in llama.cpp, and in transformers.
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QUANTISED = {"attn_q": Type.Q4_0, "attn_k": Type.Q8_0, "ffn_up": Type.Q4_0, "ffn_down": Type.F16, "attn_v": Type.F16}


@dataclass(frozen=True)
class Written:
    """A GGUF file, and what it should become."""

    path: Path
    model: Any  # in float32, with the numbers that the file holds
    tokenizer: Tokenizer


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    types: Mapping[str, Type] | Type = Type.F32,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
) -> Written:
    """Writes a random model. `types` are the types of matrices, by module; `keys` and `tensors` are written too.

    A key whose value is None, and tensors in `without`, are left out. Text is split as by SmolLM2.
    """
    torch.manual_seed(0)
    tokenizer = tokenizer or train_tokenizer()
    model = _build(architecture, tokenizer.get_vocab_size())
    writer = gguf.GGUFWriter(path, architecture)
    values = _keys(architecture, model.config) | tokenizer_keys(tokenizer) | dict(keys or {})
    for key, value in values.items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    stored = copy.deepcopy(model)
    state = stored.state_dict()
    for name, (theirs, tensor) in _tensors(model).items():
        if name in without:
            continue
        module = name.removesuffix(".weight").rpartition(".")[2]
        is_matrix = tensor.ndim == 2
        kind = (types.get(module, Type.F32) if isinstance(types, Mapping) else types) if is_matrix else Type.F32
        turned = _turn_heads(tensor, name, architecture)
        data = gguf.quantize(turned, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        state[theirs].copy_(torch.from_numpy(_turn_back(gguf.dequantize(data, kind), name, architecture)))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, stored.eval(), tokenizer)


def train_tokenizer(split: Any = None) -> Tokenizer:
    """Returns a byte-level byte-pair encoding that splits text like SmolLM2's, or by `split`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=352,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def tokenizer_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the keys of a GGUF file for a byte-level tokenizer."""
    import json

    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _build(architecture: str, vocab_size: int) -> Any:
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _SHARED_HEADS,
        "max_position_embeddings": 128,
        "rope_theta": 50_000.0,
    }
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 + 0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def _keys(architecture: str, config: Any) -> dict[str, Any]:
    settings = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
    }
    general = {"general.name": "Tiny", "general.license": "apache-2.0", "general.base_model.0.name": "Tiny Base"}
    return general | {f"{architecture}.{key}": value for key, value in settings.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)


def _tensors(model: Any) -> dict[str, tuple[str, np.ndarray]]:
    """Returns {name in the file: (name in transformers, values)}."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not model.config.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in _NAMES.items():
            for part in ("weight", "bias"):
                if (name := f"model.layers.{layer}.{theirs}.{part}") in state:
                    names[f"blk.{layer}.{ours}.{part}"] = name
    return {name: (theirs, state[theirs]) for name, theirs in names.items()}


def _heads(name: str, architecture: str) -> int | None:
    """Returns the number of heads whose rows llama.cpp stores in another order; None if it stores them as they are."""
    if architecture != "llama":
        return None
    return {"attn_q": _HEADS, "attn_k": _SHARED_HEADS}.get(name.split(".")[-2])


def _turn_heads(tensor: np.ndarray, name: str, architecture: str) -> np.ndarray:
    """Returns a tensor as llama.cpp stores it: of Llama's queries and keys, it pairs the rows that rotate together."""
    heads = _heads(name, architecture)
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def _turn_back(tensor: np.ndarray, name: str, architecture: str) -> np.ndarray:
    heads = _heads(name, architecture)
    if heads is None:
        return np.ascontiguousarray(tensor)
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(tensor.shape))
