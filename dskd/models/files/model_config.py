"""Reading a model's config.json: translating it for the installed transformers, or refusing it.

This happens before anything is built, because transformers silently ignores keys that it does not know: the model would
then lack a part of its function, and nobody would notice.
"""

import contextlib
import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

from dskd.console import say
from dskd.errors import UserError, listed

# Keys that describe parts of models that take more than text.
_OTHER_INPUTS = ("vision_config", "audio_config", "vision_tower", "mm_projector_type", "text_config", "visual")
_OF_MODELOPT = "hf_quant_config.json"  # NVIDIA's ModelOpt says there how it quantised
_NO_DECODERS = ("ForMaskedLM", "ForConditionalGeneration")
# Patterns in the names of keys that change what a model computes. Authors put many other keys into config.json too.
_CHANGES_FUNCTION = re.compile(
    r"rope|rotary|attn|attention|norm|scal|cap\b|capping|window|expert|rout|act\b|activation|bias|position|moe|gate|topk"
    r"|layer|head|mult|sparse|chunk"
)
_HARMLESS = re.compile(r"^_|^unsloth|transformers_version|auto_map|^quantization_config$|dropout|pdrop|initializer")
# Model types whose rope_scaling transformers 4.57 checks: it must have a fixed set of keys, with the kind under `type`.
_LONGROPE_BY_TYPE = ("phi3", "phimoe")


def read_model_config(
    folder: Path, *, named_by: str = "", source: str = "", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Returns the config.json of a folder in a form that the installed transformers reads correctly.

    Keys of transformers 5 are translated and also kept, so that both versions read the result alike. A
    `quantization_config` is dropped, since :class:`dskd.models.files.weights.TensorReader` undoes the quantisation.
    Messages name the file, or `source` if it is a copy, after `named_by`, the key or option that names it.

    Raises:
        UserError: when the file is not JSON, does not describe a text decoder, describes a quantised model that cannot
            be read, or has a key that changes the function and that the installed transformers does not know.
    """
    file = source or str(folder / "config.json")
    values = load_json(folder / "config.json")
    where = f"{named_by}: {file}" if named_by else file
    _refuse_other_models(values, where)
    _refuse_quantised(values, folder, where)
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    if "auto_map" in values and trust_remote_code:
        return values  # the model's own code reads these keys, so they are not checked here
    if "auto_map" in values and not _is_known(values.get("model_type")):
        raise UserError(f"{where}: the model brings its own code, which runs {condition_of_code(named_by)}")
    if not _is_known(values.get("model_type")):
        raise UserError(
            f"{where}: the installed transformers {_installed()} has no causal language model of the type "
            f"{values.get('model_type')!r} (the file was written by {values.get('transformers_version', 'another')})"
        )
    values = _translate_rotations(values, where)
    _check_keys(values, where, file)
    return values


def condition_of_code(named_by: str) -> str:
    """Returns when code that comes with a model runs, and what to do; `named_by` is the key that names the model."""
    if named_by == "student.path":
        return "for teachers only; name another student"
    return "only with teacher.trust_remote_code: true; read that code first"


def load_json(file: Path) -> dict[str, Any]:
    """Loads a config.json; raises a UserError if it holds no JSON object that transformers could load too."""
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError(
                "it begins with a byte order mark, with which transformers cannot read it; save it as UTF-8 without one"
            )
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: this is not a readable config.json ({error})") from None
    return values


def block_fp8(values: dict[str, Any]) -> tuple[int, int] | None:
    """Returns the rows and columns of the blocks that share a scale in DeepSeek's block FP8; None for anything else.

    `values` is a config.json, which declares the format in `quantization_config`.
    """
    declared = values.get("quantization_config")
    if not isinstance(declared, dict) or declared.get("quant_method") != "fp8":
        return None
    size = declared.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return None


def _refuse_other_models(values: dict[str, Any], where: str) -> None:
    parts = [key for key in _OTHER_INPUTS if values.get(key)]
    name = ", ".join(values.get("architectures") or []) or str(values.get("model_type"))
    if parts:
        raise UserError(
            f"{where}: {name} is a multimodal model ({parts[0]}); only decoders for text are supported. Use a folder "
            "with the text model alone"
        )
    if values.get("is_encoder_decoder"):
        raise UserError(f"{where}: {name} is an encoder-decoder; only decoders are supported")
    if any(str(name).endswith(_NO_DECODERS) for name in values.get("architectures") or []):
        raise UserError(f"{where}: {name} does not predict the next token; only decoders are supported")


def _refuse_quantised(values: dict[str, Any], folder: Path, where: str) -> None:
    if (folder / _OF_MODELOPT).is_file() and block_fp8(values) is None:
        method = f"there is a {_OF_MODELOPT}"
    elif declared := values.get("compression_config"):
        method = f"compression_config: {_method(declared)}"
    elif (declared := values.get("quantization_config")) and block_fp8(values) is None:
        method = _method(declared)
    else:
        return
    raise UserError(
        f"{where}: the weights are quantised ({method}); only unquantised weights and block FP8 (quant_method fp8 with "
        "weight_block_size) can be read. Use the model that this one was made from"
    )


def _method(declared: Any) -> str:
    return str(declared.get("quant_method", "unnamed method") if isinstance(declared, dict) else declared)


def _translate_rotations(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Adds the keys that transformers 4 reads instead of `rope_parameters`.

    Raises:
        UserError: when the keys of transformers 4 cannot express them, or existing keys contradict them.
    """
    rotations = values.get("rope_parameters")
    if not rotations:
        return values
    accepted = _accepted(values["model_type"])
    layers = {kind: rope for kind, rope in rotations.items() if isinstance(rope, dict)}
    added: dict[str, Any] = {}
    full = rotations
    # `rope_parameters` may have an entry per kind of layer. Transformers 4 has a second base for layers with a window
    # in some architectures, under one of two keys, and nothing more: anything else that differs is refused.
    if layers:
        if set(rotations) - {"full_attention", "sliding_attention"} or "full_attention" not in layers:
            raise _unknown_rotations(values, where, f"kinds of layers {', '.join(rotations)}")
        full = layers["full_attention"]
        local = layers.get("sliding_attention", full)
        local_key = next((key for key in ("rope_local_base_freq", "local_rope_theta") if key in accepted), None)
        if local_key is not None:
            if local.get("rope_type", "default") != "default":
                raise _unknown_rotations(values, where, f"rope_type {local['rope_type']} in layers with a window")
            added[local_key] = local.get("rope_theta")
        elif local != full:
            # In both versions, OLMo 3 scales the rotations of its full-attention layers only.
            same_base = local.get("rope_theta") == full.get("rope_theta")
            if not (values["model_type"] == "olmo3" and same_base and local.get("rope_type") == "default"):
                raise _unknown_rotations(values, where, "different rotations by the kind of a layer")
    # The base and the rotated share of a head have keys of their own; what is left in `rest` describes the scaling.
    rest = {key: value for key, value in full.items() if value is not None}
    base_key = next((key for key in ("rope_theta", "global_rope_theta", "rotary_emb_base") if key in accepted), None)
    base = rest.pop("rope_theta", None)
    if base is not None:
        if base_key is None:
            raise _unknown_rotations(values, where, "rope_theta")
        added[base_key] = base
    part = rest.pop("partial_rotary_factor", None)
    if part is not None:
        added["rotary_pct" if "rotary_pct" in accepted else "partial_rotary_factor"] = part
    kind = rest.pop("rope_type", rest.pop("type", "default"))
    rest.pop("type", None)
    if values["model_type"] in _LONGROPE_BY_TYPE and kind != "default":
        original = rest.pop("original_max_position_embeddings", None)
        if original is not None:
            added["original_max_position_embeddings"] = original
        rest["type"] = kind
    else:
        rest["rope_type"] = kind
    if kind != "default":
        if "rope_scaling" not in accepted:
            raise _unknown_rotations(values, where, f"rope_type {kind}")
        added["rope_scaling"] = rest
    added = {key: value for key, value in added.items() if value is not None}
    for key, value in added.items():
        if values.get(key) not in (None, value):
            raise UserError(f"{where}: {key} is {values[key]}, but rope_parameters has {value}; remove the wrong one")
    return values | added


def _unknown_rotations(values: dict[str, Any], where: str, what: str) -> UserError:
    return UserError(
        f"{where}: rope_parameters (written by transformers {values.get('transformers_version', '5')}) has {what}, "
        f"which the installed transformers {_installed()} cannot compute for {values['model_type']}"
    )


def _check_keys(values: dict[str, Any], where: str, file: str) -> None:
    """Refuses keys of a newer transformers that change the function, and warns of others that may, once per file."""
    known = _accepted(values["model_type"]) | {"rope_parameters", "partial_rotary_factor"}
    unknown = [
        key
        for key, value in values.items()
        if key not in known
        and value not in (None, False, [], {})
        and _CHANGES_FUNCTION.search(key)
        and not _HARMLESS.search(key)
    ]
    if unknown:
        read = _read_by_code(values["model_type"])
        unknown = [key for key in unknown if key not in read]
    if not unknown:
        return
    written_by = str(values.get("transformers_version", "an unnamed version"))
    if _major(written_by) > _major(_installed()):
        raise UserError(
            listed(
                f"{where}: written by transformers {written_by}, with keys that change the function and that the "
                f"installed {_installed()} does not know",
                [f"{key}: {json.dumps(values[key])[:80]}" for key in unknown],
            )
        )
    _warn_once(file, written_by, tuple(unknown))


@functools.cache
def _warn_once(file: str, written_by: str, unknown: tuple[str, ...]) -> None:
    say(
        f"warning: {file} (transformers {written_by}): transformers {_installed()} does not know "
        f"{', '.join(unknown)}; they change nothing"
    )


@functools.cache
def _accepted(model_type: str) -> frozenset[str]:
    """Returns the keys that the config class of a model type reads."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    config_class = CONFIG_MAPPING[model_type]
    names = set(vars(PretrainedConfig())) | set(config_class.attribute_map)
    for parent in config_class.__mro__:
        names |= set(inspect.signature(parent.__init__).parameters) | set(vars(parent))
    return frozenset(names | {"dtype", "torch_dtype"})


@functools.cache
def _read_by_code(model_type: str) -> frozenset[str]:
    """Returns the keys that a config class sets by itself, and those that only its code or the model's code names."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    names: set[str] = set()
    with contextlib.suppress(Exception):  # some cannot be made without values
        names |= set(vars(config_class()))
    text = inspect.getsource(inspect.getmodule(config_class) or config_class)
    pairs = re.findall(r"""self\.(\w+) =|["'](\w+)["']""", text)
    names |= {name for pair in pairs for name in pair}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    text = inspect.getsource(inspect.getmodule(model_class) or model_class)
    pairs = re.findall(r"""\bconfig\.(\w+)|\bgetattr\(\s*(?:self\.)?config,\s*["'](\w+)""", text)
    return frozenset(names | {name for pair in pairs for name in pair})


def _is_known(model_type: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _installed() -> str:
    import transformers

    return str(transformers.__version__)


def _major(version: str) -> int:
    number = re.match(r"\d+", version)
    return int(number.group()) if number else 0
