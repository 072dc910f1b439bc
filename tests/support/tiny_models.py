"""Random models of toy size in common architectures, with a tokenizer that knows a few words."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
}
MODELS = {
    **ARCHITECTURES,
    "narrow": lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": 24})),  # of another width than the others
}


def word_tokenizer(words: list[str]) -> Any:
    """Returns a tokenizer with one token per word, after a space or not; unknown words are `<unk>`."""
    vocabulary = {word: index for index, word in enumerate(["<end>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


def save_model(folder: Path, architecture: str = "llama", seed: int = 0, words: list[str] | None = None) -> Any:
    """Writes a random model with its tokenizer, and returns the model."""
    torch.manual_seed(seed)
    model = MODELS[architecture]().eval()
    # Random weights of the usual size give almost uniform predictions; with larger ones, models differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    word_tokenizer(words or [f"w{index}" for index in range(100)]).save_pretrained(folder)
    return model
