"""The config.json of the model in a GGUF file, as transformers derives it, and checks that nothing is left out.

Transformers silently ignores keys and tensors of a GGUF file that it has no place for: the model would then lack a part
of its function, such as the scaling of its rotations. So each key of the architecture must have been read, or say what
the resulting config says anyway, and each tensor must have a place in the model.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dskd.errors import UserError, listed, reason_of, shortened
from dskd.models.files.folder import BAD_CONFIG
from dskd.models.files.gguf_file import GgufFile
from dskd.models.gguf.tokenizer import vocabulary_rows

_INSTEAD = "name a Hugging Face folder of the model instead"
_ROTATION_FACTORS = "rope_freqs.weight"
# What a key that transformers leaves out should be, from the values of the config: the first of these that it has.
_SAME_AS: Mapping[str, tuple[str, ...]] = {
    "attention.causal": ("always_true",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attention.value_length": ("head_dim",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "context_length": ("max_position_embeddings", "seq_length", "n_positions"),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner", "four_times_width"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rope.dimension_count": ("rotated_width",),
    "rope.freq_base": ("rope_theta",),
    "rope.freq_base_swa": ("rope_local_base_freq",),
    "rope.scaling.type": ("scaling_type",),
    "use_parallel_residual": ("use_parallel_residual", "parallel_attn"),
    "vocab_size": ("vocab_size",),
}
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned")
_OF_NO_ROPE_SCALING = ("rope.scaling.",)  # have no effect if rope.scaling.type is none
# The largest Gemma 2 and 3 scale attention by a factor that GGUF cannot store, so transformers would use the smaller
# models'.
_OTHER_ATTENTION_SCALE = {"gemma2": 46, "gemma3": 62}


def read_config(file: GgufFile) -> Any:
    """Returns the `PretrainedConfig` of the model in a GGUF file.

    Raises:
        UserError: if transformers cannot read the architecture, or leaves out keys that change what it computes.
    """
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    if not file.architecture:
        raise UserError(
            f"teacher.path: {file.path}: the file does not say its architecture (the key general.architecture); it is "
            "damaged, or not a language model: download or convert it again"
        )
    known = sorted(set(GGUF_CONFIG_MAPPING) - {"general", "tokenizer"})
    name = _name_in_transformers(file.architecture)
    if name not in known:
        raise UserError(
            f"teacher.path: {file.path}: the installed transformers cannot read the architecture {file.architecture!r} "
            f"from GGUF, only {', '.join(known)}; {_INSTEAD}"
        )
    rows = vocabulary_rows(file)
    tokens = file.value(f"{file.architecture}.vocab_size", int) or len(file.list_of("tokenizer.ggml.tokens", str) or ())
    try:
        with tempfile.TemporaryDirectory(prefix="dskd-gguf-") as folder:
            _write_without_content(file, rows, Path(folder) / "model.gguf")
            config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    except BAD_CONFIG as error:
        raise UserError(f"teacher.path: {file.path}: transformers cannot read it ({reason_of(error)})") from None
    config.vocab_size = rows  # not all architectures have a key for it
    config._name_or_path = ""
    vars(config).pop("_model_name_or_path", None)  # where transformers puts general.name
    if tokens and tokens != rows:
        raise UserError(
            f"teacher.path: {file.path}: its keys say {tokens:,} tokens, but there are {rows:,} embeddings; the file "
            "is damaged"
        )
    _read_rotation_factors(file, config)
    _check_keys(file, config, GGUF_CONFIG_MAPPING[name])
    return config


def check_tensors(file: GgufFile, model: Any) -> None:
    """Refuses a file with tensors that transformers has no place for in the model.

    Args:
        file: the GGUF file.
        model: its architecture, on the meta device.

    Raises:
        UserError: with their names.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    try:
        places = get_gguf_hf_weights_map(model)
    except (NotImplementedError, KeyError) as error:  # transformers raises either for an unknown architecture
        raise UserError(f"teacher.path: {file.path}: the installed gguf has no names for it ({error})") from None
    read = {*places, "output.weight", _ROTATION_FACTORS}  # an output matrix unties the embeddings
    if unread := [tensor.name for tensor in file.tensors if tensor.name not in read]:
        raise UserError(
            f"teacher.path: {file.path}: transformers leaves out {len(unread)} of {len(file.tensors)} tensors, without "
            f"which the model would compute something else: {shortened(unread, 5)}; {_INSTEAD}"
        )


def _write_without_content(file: GgufFile, rows: int, path: Path) -> None:
    """Writes a GGUF file with the same keys and names of tensors, but without the tokenizer and without numbers.

    Transformers needs no more to derive the config, and takes up to a minute to read a large vocabulary.
    """
    import gguf

    writer = gguf.GGUFWriter(path, file.architecture)
    for key, value in {f"{file.architecture}.vocab_size": rows, **file.values}.items():
        if key == "general.architecture" or (key.startswith("tokenizer.") and isinstance(value, (list, str))):
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_int64(key, value) if value < 0 else writer.add_uint64(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        else:
            writer.add_string(key, value)
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name_in_transformers(architecture: str) -> str:
    return {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(architecture, architecture)


def _check_keys(file: GgufFile, config: Any, mapping: Mapping[str, Any]) -> None:
    """Refuses keys of the architecture that transformers has left out and that its config contradicts or cannot say."""
    prefix = f"{file.architecture}."
    read = {key for key, name in mapping.items() if name not in (None, -1)} - {"vocab_size"}
    settings = {key.removeprefix(prefix): value for key, value in file.values.items() if key.startswith(prefix)}
    is_scaled = settings.get("rope.scaling.type", "none") != "none"
    problems = []
    for key, value in settings.items():
        if key in read or key in _HARMLESS:
            continue
        if key.startswith(_OF_NO_ROPE_SCALING) and not is_scaled:
            continue
        names = _SAME_AS.get(key, ())
        built = next((own for name in names if (own := _value_of(config, name)) is not None), None)
        if built is None:
            problems.append(f"{prefix}{key}: {_shown(value)} (there is no such key in {type(config).__name__})")
        elif not _is_same(value, built):
            problems.append(f"{prefix}{key}: {_shown(value)} (its model would have {built})")
    if settings.get("block_count") == _OTHER_ATTENTION_SCALE.get(file.architecture, 0):
        problems.append(f"the attention scale, which differs in {file.architecture} of this depth")
    if problems:
        raise UserError(
            listed(
                f"teacher.path: {file.path}: transformers leaves out keys of the file, without which the model would "
                f"compute something else; {_INSTEAD}",
                problems,
            )
        )


def _value_of(config: Any, name: str) -> Any:
    special: dict[str, Callable[[], Any]] = {
        "always_true": lambda: True,
        "head_dim": lambda: _head_dim(config),
        "four_times_width": lambda: 4 * config.hidden_size,
        "rotated_width": lambda: round(_head_dim(config) * _rotated_share(config)),
        "scaling_type": lambda: "none",
    }
    return special[name]() if name in special else getattr(config, name, None)


def _rotated_share(config: Any) -> float:
    shares = (getattr(config, name, None) for name in ("partial_rotary_factor", "rotary_pct"))
    return next((float(share) for share in shares if share is not None), 1.0)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_same(value: Any, built: Any) -> bool:
    if isinstance(value, list):
        return all(_is_same(entry, built) for entry in value)
    if isinstance(value, float):  # GGUF stores 32 bits
        return isinstance(built, (int, float)) and math.isclose(value, built, rel_tol=1e-6)
    return bool(value == built)


def _shown(value: Any) -> str:
    return f"[{shortened(value, 5)}]" if isinstance(value, list) else str(value)


def _read_rotation_factors(file: GgufFile, config: Any) -> None:
    """Gives the config the scaling of rotations of Llama 3.1 if the file's tensor of factors says exactly that.

    llama.cpp stores the factors that follow from `rope_scaling` in a tensor, and transformers leaves that tensor out.

    Raises:
        UserError: if the factors are others.
    """
    if all(tensor.name != _ROTATION_FACTORS for tensor in file.tensors):
        return
    factors = _read_tensor(file, _ROTATION_FACTORS).reshape(-1)
    largest = float(factors.max())
    if largest == 1 and float(factors.min()) == 1:
        return
    scaling = {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if factors.shape == (_head_dim(config) // 2,) and _explains(scaling, factors, config):
        config.rope_scaling = scaling
        return
    raise UserError(
        f"teacher.path: {file.path}: its rotations are scaled by {_ROTATION_FACTORS} (from {float(factors.min()):g} to "
        f"{largest:g}), and not as in Llama 3.1, which is the only scaling that can be read from GGUF; {_INSTEAD}"
    )


def _explains(scaling: dict[str, Any], factors: Any, config: Any) -> bool:
    """Returns True if transformers computes the rotations of these factors from this scaling."""
    import copy

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = copy.deepcopy(config)
    scaled.rope_scaling = dict(scaling)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    width = _head_dim(config)
    plain = config.rope_theta ** (-np.arange(0, width, 2) / width)
    return bool(np.allclose(plain / frequencies.double().numpy(), factors, rtol=1e-4))


def _read_tensor(file: GgufFile, name: str) -> Any:
    """Returns the numbers of one tensor, as an array of float32."""
    import gguf

    tensor = next(tensor for tensor in file.tensors if tensor.name == name)
    stored = np.fromfile(file.path, np.uint8, tensor.size_bytes, offset=tensor.offset)
    return gguf.dequantize(stored, gguf.GGMLQuantizationType[tensor.type_name])
