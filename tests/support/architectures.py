"""A table of the decoders that transformers can build small, for tests and `docs/models.md`.

Each model has toy size and random weights, large enough that its layers, and its experts, differ: with weights of the
usual size attention is almost uniform, so a wrongly read tensor would not be noticed. Persistent buffers that training
would fill are random, too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tiny_models import SHAPE, word_tokenizer

VOCABULARY, WIDTH, LAYERS = (SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers"))
POSITIONS = 96
EXPERTS = 4

# transformers draws matrices with a standard deviation of .02; at this width, .18 preserves the size of a state.
_USUAL_DEVIATION, _DEVIATION = 0.05, 0.18

_NAMED = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SHAPE = SHAPE | _NAMED | {"max_position_embeddings": POSITIONS}
_OLD = {**_NAMED, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
_MULTI_HEAD = _SHAPE | {"num_key_value_heads": 4}
_PLAIN = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_DEEPSEEK = {
    **_MULTI_HEAD,
    **{"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_QWEN_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GRANITE = {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}


@dataclass(frozen=True)
class Architecture:
    """A decoder of the table.

    `example` names a published model of this kind.
    """

    example: str
    config: Callable[[], Any]
    is_mixture: bool = False


def _dense(example: str, name: str, **values: Any) -> Architecture:
    return Architecture(example, lambda: getattr(hf, name)(**values))


def _mixture(example: str, name: str, **values: Any) -> Architecture:
    return Architecture(example, lambda: getattr(hf, name)(**values), is_mixture=True)


def _llama_rope(**scaling: Any) -> Architecture:
    return _dense(f"Llama with rope_type {scaling['rope_type']}", "LlamaConfig", **_SHAPE, rope_scaling=scaling)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _dense("Llama 2, Llama 3", "LlamaConfig", **_SHAPE),
    "llama-bias": _dense("Llama with biases", "LlamaConfig", **_SHAPE, attention_bias=True, mlp_bias=True),
    "llama-linear": _llama_rope(rope_type="linear", factor=4.0),
    "llama-dynamic": _llama_rope(rope_type="dynamic", factor=4.0),
    "llama-yarn": _llama_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=24),
    "llama-llama3": _llama_rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24
    ),
    "mistral": _dense("Mistral 7B v0.1", "MistralConfig", **_SHAPE, sliding_window=8),
    "ministral": _dense("Ministral 8B", "MinistralConfig", **_SHAPE, head_dim=8, sliding_window=8),
    "qwen2": _dense("Qwen 2.5", "Qwen2Config", **_SHAPE, tie_word_embeddings=True),
    "qwen2-windows": _dense(
        "Qwen2 with windows", "Qwen2Config", **_SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "qwen3": _dense("Qwen 3", "Qwen3Config", **_SHAPE, head_dim=8),
    "gemma": _dense("Gemma", "GemmaConfig", **_SHAPE, head_dim=8),
    "gemma2": _dense(
        "Gemma 2",
        "Gemma2Config",
        **{**_SHAPE, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 1.0},
        query_pre_attn_scalar=8,
    ),
    "gemma3": _dense(
        "Gemma 3 (text)", "Gemma3TextConfig", **_SHAPE, head_dim=8, sliding_window=8, sliding_window_pattern=2
    ),
    "phi": _dense("Phi 1.5, Phi 2", "PhiConfig", **_MULTI_HEAD),
    "phi3": _dense("Phi 3 mini 4k", "Phi3Config", **_SHAPE),
    "phi3-longrope": _dense(
        "Phi 3 mini 128k", "Phi3Config", **_SHAPE, original_max_position_embeddings=24, rope_scaling=_LONGROPE
    ),
    "olmo": _dense("OLMo", "OlmoConfig", **_SHAPE),
    "olmo2": _dense("OLMo 2", "Olmo2Config", **_SHAPE),
    "olmo3": _dense("OLMo 3", "Olmo3Config", **_SHAPE, sliding_window=8),
    "cohere": _dense("Command R", "CohereConfig", **_SHAPE),
    "cohere2": _dense("Command R7B", "Cohere2Config", **_SHAPE, sliding_window=8, sliding_window_pattern=2),
    "granite": _dense("Granite 3", "GraniteConfig", **_SHAPE, **_GRANITE),
    "gpt2": _dense("GPT-2", "GPT2Config", **_OLD),
    "gpt2-scaled": _dense(
        "GPT-2 with scale_attn_by_inverse_layer_idx", "GPT2Config", **_OLD, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt-bigcode": _dense("StarCoder", "GPTBigCodeConfig", **_OLD),
    "gpt-neox": _dense("Pythia", "GPTNeoXConfig", **_PLAIN),
    "gpt-neox-japanese": _dense("GPT-NeoX Japanese", "GPTNeoXJapaneseConfig", **_PLAIN),
    "gptj": _dense("GPT-J", "GPTJConfig", **_OLD, rotary_dim=4),
    "gpt-neo": _dense(
        "GPT-Neo",
        "GPTNeoConfig",
        **_NAMED,
        **{"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 4, "max_position_embeddings": POSITIONS},
        **{"attention_types": [[["global", "local"], 2]], "window_size": 8},
    ),
    "bloom": _dense("BLOOM", "BloomConfig", **_NAMED, hidden_size=WIDTH, n_layer=LAYERS, n_head=4),
    "opt": _dense("OPT", "OPTConfig", **_PLAIN, ffn_dim=48, word_embed_proj_dim=WIDTH),
    "falcon": _dense("Falcon 7B", "FalconConfig", **_PLAIN, multi_query=True, parallel_attn=True, alibi=False),
    "falcon-new": _dense("Falcon 40B", "FalconConfig", **_PLAIN, num_kv_heads=2, new_decoder_architecture=True),
    "falcon-alibi": _dense("Falcon-RW", "FalconConfig", **_PLAIN, alibi=True, multi_query=False, parallel_attn=False),
    "mpt": _dense(
        "MPT", "MptConfig", vocab_size=VOCABULARY, d_model=WIDTH, n_heads=4, n_layers=LAYERS, max_seq_len=POSITIONS
    ),
    "stablelm": _dense("StableLM", "StableLmConfig", **_SHAPE),
    "starcoder2": _dense("StarCoder 2", "Starcoder2Config", **_SHAPE, sliding_window=8),
    "nemotron": _dense("Nemotron, Minitron", "NemotronConfig", **_SHAPE, head_dim=8),
    "glm": _dense("GLM-4 9B", "GlmConfig", **_SHAPE, head_dim=8),
    "glm4": _dense("GLM-4 0414", "Glm4Config", **_SHAPE, head_dim=8),
    "exaone4": _dense("EXAONE 4", "Exaone4Config", **_SHAPE, sliding_window=8, sliding_window_pattern=2),
    "smollm3": _dense("SmolLM 3", "SmolLM3Config", **_SHAPE, no_rope_layer_interval=2),
    "helium": _dense("Helium", "HeliumConfig", **_SHAPE, head_dim=8),
    "apertus": _dense("Apertus", "ApertusConfig", **_SHAPE),
    "arcee": _dense("Arcee AFM", "ArceeConfig", **_SHAPE),
    "ernie4-5": _dense("ERNIE 4.5 0.3B", "Ernie4_5Config", **_SHAPE, head_dim=8),
    "seed-oss": _dense("Seed-OSS", "SeedOssConfig", **_SHAPE, head_dim=8),
    "hunyuan": _dense("HunYuan dense", "HunYuanDenseV1Config", **_SHAPE, head_dim=8),
    "lfm2": _dense(
        "LFM 2", "Lfm2Config", **_SHAPE, full_attn_idxs=[1, 3], block_multiple_of=16, block_ffn_dim_multiplier=1.0
    ),
    "diffllama": _dense("DiffLlama", "DiffLlamaConfig", **_SHAPE),
    "modernbert-decoder": _dense(
        "Ettin",
        "ModernBertDecoderConfig",
        **{**_PLAIN, "cls_token_id": 0, "sep_token_id": 0, "local_attention": 16, "global_attn_every_n_layers": 2},
    ),
    "biogpt": _dense("BioGPT", "BioGptConfig", **_PLAIN),
    "xglm": _dense(
        "XGLM",
        "XGLMConfig",
        **{**_NAMED, "d_model": WIDTH, "ffn_dim": 48, "num_layers": LAYERS, "attention_heads": 4},
        max_position_embeddings=POSITIONS,
    ),
    "codegen": _dense("CodeGen", "CodeGenConfig", **_OLD, rotary_dim=4),
    "persimmon": _dense("Persimmon", "PersimmonConfig", **_PLAIN),
    "bitnet": _dense("BitNet", "BitNetConfig", **_SHAPE),
    "vaultgemma": _dense("VaultGemma", "VaultGemmaConfig", **_SHAPE, head_dim=8, sliding_window=8),
    "openai-gpt": _dense("GPT", "OpenAIGPTConfig", **_OLD),
    "xlm": _dense("XLM", "XLMConfig", **_NAMED, emb_dim=WIDTH, n_layers=LAYERS, n_heads=4, causal=True),
    "ctrl": _dense("CTRL", "CTRLConfig", **_OLD, dff=48),
    "bert": _dense("BERT as a decoder", "BertConfig", **_PLAIN, is_decoder=True),
    "roberta": _dense("RoBERTa as a decoder", "RobertaConfig", **_PLAIN, is_decoder=True),
    "llama4-dense": _dense(
        "Llama 4 (text) without experts",
        "Llama4TextConfig",
        **{**_SHAPE, "head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [], "attention_chunk_size": 16},
        no_rope_layer_interval=2,
    ),
    "mamba": _dense("Mamba", "MambaConfig", **_NAMED, hidden_size=WIDTH, num_hidden_layers=LAYERS),
    "recurrent-gemma": _dense(
        "RecurrentGemma", "RecurrentGemmaConfig", **_SHAPE, lru_width=WIDTH, attention_window_size=8
    ),
    "falcon-h1": _dense(
        "Falcon-H1",
        "FalconH1Config",
        **{**_SHAPE, "mamba_d_ssm": WIDTH, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        **{"mamba_chunk_size": 8, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "doge": _dense("Doge", "DogeConfig", **_SHAPE),
    "mixtral": _mixture("Mixtral", "MixtralConfig", **_SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "qwen2-moe": _mixture(
        "Qwen 1.5 MoE", "Qwen2MoeConfig", **_SHAPE, **_QWEN_EXPERTS, shared_expert_intermediate_size=16
    ),
    "qwen3-moe": _mixture("Qwen 3 MoE", "Qwen3MoeConfig", **_SHAPE, **_QWEN_EXPERTS, head_dim=8),
    "qwen3-moe-sparse": _mixture(
        "Qwen 3 MoE with dense layers",
        "Qwen3MoeConfig",
        **{**_SHAPE, **_QWEN_EXPERTS, "head_dim": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "olmoe": _mixture("OLMoE", "OlmoeConfig", **_SHAPE, num_experts=EXPERTS, num_experts_per_tok=2),
    "flex-olmo": _mixture("FlexOlmo", "FlexOlmoConfig", **_SHAPE, num_experts=EXPERTS, num_experts_per_tok=2),
    "deepseek-v2": _mixture("DeepSeek V2", "DeepseekV2Config", **_DEEPSEEK, **_LATENT),
    "deepseek-v3": _mixture("DeepSeek V3, R1, Kimi K2", "DeepseekV3Config", **_DEEPSEEK, **_LATENT),
    "glm4-moe": _mixture("GLM-4.5", "Glm4MoeConfig", **_DEEPSEEK, head_dim=8),
    "dots1": _mixture("dots.llm1", "Dots1Config", **_DEEPSEEK, head_dim=8),
    "gpt-oss": _mixture(
        "GPT-OSS",
        "GptOssConfig",
        **{**_SHAPE, "head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 8},
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "truncate": False},
    ),
    "granite-moe": _mixture(
        "Granite 3 MoE", "GraniteMoeConfig", **_SHAPE, **_GRANITE, num_local_experts=EXPERTS, num_experts_per_tok=2
    ),
    "granite-moe-shared": _mixture(
        "Granite MoE shared",
        "GraniteMoeSharedConfig",
        **{**_SHAPE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    ),
    "phimoe": _mixture("Phi 3.5 MoE", "PhimoeConfig", **_SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "ernie4-5-moe": _mixture(
        "ERNIE 4.5 21B",
        "Ernie4_5_MoeConfig",
        **{**_SHAPE, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "hunyuan-moe": _mixture(
        "HunYuan A13B", "HunYuanMoEV1Config", **_SHAPE, num_experts=EXPERTS, moe_topk=2, head_dim=8
    ),
    "llama4": _mixture(
        "Llama 4 (text)",
        "Llama4TextConfig",
        **{**_SHAPE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": EXPERTS},
        **{"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 16},
    ),
    "dbrx": _mixture(
        "DBRX",
        "DbrxConfig",
        **{"vocab_size": VOCABULARY, "d_model": WIDTH, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": POSITIONS},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    ),
    "jetmoe": _mixture(
        "JetMoE",
        "JetMoeConfig",
        **{**_NAMED, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "kv_channels": 8},
        **{"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 16},
    ),
    "minimax": _mixture(
        "MiniMax", "MiniMaxConfig", **_SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=2, block_size=8
    ),
    "qwen3-next": _mixture(
        "Qwen 3 Next",
        "Qwen3NextConfig",
        **{**_SHAPE, **_QWEN_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "jamba": _mixture(
        "Jamba",
        "JambaConfig",
        **{
            **_SHAPE,
            "num_experts": EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        **{"mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
    "granite-hybrid": _mixture(
        "Granite 4",
        "GraniteMoeHybridConfig",
        **{**_SHAPE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
        **{"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
        **{"mamba_chunk_size": 8, **_GRANITE},
    ),
    "longcat": _mixture(
        "LongCat Flash",
        "LongcatFlashConfig",
        **{**_NAMED, "hidden_size": WIDTH, "num_layers": LAYERS, "num_attention_heads": 4, "ffn_hidden_size": 48},
        **{"max_position_embeddings": POSITIONS, "n_routed_experts": EXPERTS, "moe_topk": 2, "zero_expert_num": 2},
        **{"expert_ffn_hidden_size": 16, "head_dim": 8, **_LATENT},
    ),
}


def random_model(name: str, *, seed: int = 0) -> Any:
    """Returns a random model of the table in fp32."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name].config()).eval()
    stored = set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and 0 < parameter.std() < _USUAL_DEVIATION:
                parameter.mul_(_DEVIATION / parameter.std())
            elif (
                parameter.ndim < 2 or not parameter.any()
            ):  # norms and biases that are all alike could be mistaken for one another
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            # Tables that the config determines stay as they are.
            if key in stored and buffer.is_floating_point() and (not buffer.any() or buffer.numel() == 1):
                buffer.copy_(torch.randn_like(buffer) * 0.5)
    return model


def save_architecture(folder: Path, name: str, *, seed: int = 0) -> Any:
    """Writes a random model of the table with its tokenizer, and returns the model in fp32."""
    model = random_model(name, seed=seed)
    model.save_pretrained(folder)
    word_tokenizer([f"w{index}" for index in range(100)]).save_pretrained(folder)
    return model


def edit_config(folder: Path, **values: Any) -> None:
    """Changes keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
