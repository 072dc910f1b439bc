"""Deriving a student's `config.json` from its teacher's, so that each kept layer keeps its kind.

Many architectures have layers of several kinds: with a sliding window or without, with rotary positions or without,
dense or with experts. Some config.json files name each layer's kind in a list. Others give a rule, such as "every
fourth layer". Applied to a student that does not keep the first layers, such a rule would give its layers wrong kinds.
This module cuts the lists. It replaces a rule by the list that transformers derives from it or, if the architecture has
no such list, by a rule with the same result.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dskd.errors import UserError

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Lists of layer numbers.
_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids")
# Layers below this number are of one kind, the others of another.
_THRESHOLDS = ("max_window_layers", "first_k_dense_replace")
# Rules, and the list that replaces each.
RULES = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attn_idxs": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}
_OF_EVERY_LAYER = ("mlp_multipliers", "ssm_multipliers")  # Falcon-H1: factors within a layer, the same in all
# Names of lists with one item per layer contain "layer", or are of sizes that other models give once for all layers.
_SIZE_PREFIXES, _SIZE_SUFFIXES = ("num_",), ("_size", "_topk", "_top_k", "_heads", "_multipliers")

Rule = Callable[[Mapping[str, Any], int], bool]


def cut_config(
    values: Mapping[str, Any], layers: Sequence[int], full: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the config.json of a student.

    Args:
        values: the teacher's config.json.
        layers: the teacher's layers that the student keeps, ascending.
        full: the teacher's config as transformers completes it (`PretrainedConfig.to_dict`), with the lists that
            transformers derives from rules. If it is omitted, `values` must contain no rules.

    Raises:
        UserError: when the architecture has no way to express the kept layers' kinds.
    """
    full = values if full is None else full
    count_keys = [key for key in _COUNTS if isinstance(full.get(key), int)]
    count = full[count_keys[0]]
    new_number = {old: new for new, old in enumerate(layers)}
    result = dict(values)
    for key in count_keys:
        if full[key] == count:
            result[key] = len(layers)
    for key, value in full.items():
        if key in _INDEX_LISTS and isinstance(value, list):
            result[key] = [new_number[layer] for layer in value if layer in new_number]
        elif is_per_layer(key, value, count):
            result[key] = [value[layer] for layer in layers]
        elif key in _THRESHOLDS and isinstance(value, int):
            result[key] = sum(layer < value for layer in layers)
    for rule, replacement in RULES.items():
        if isinstance(full.get(replacement), list):
            result.pop(rule, None)
    _replace_rules(result, full, layers)
    return result


def is_per_layer(key: str, value: Any, count: int) -> bool:
    """Returns True if the value is a list with one item for each of `count` layers."""
    named = "layer" in key or key.startswith(_SIZE_PREFIXES) or key.endswith(_SIZE_SUFFIXES)
    return isinstance(value, list) and len(value) == count and named and key not in (*_INDEX_LISTS, *_OF_EVERY_LAYER)


def _replace_rules(result: dict[str, Any], full: Mapping[str, Any], layers: Sequence[int]) -> None:
    """Replaces, in `result`, the rules of architectures that have no list to use instead."""
    numbers = range(len(layers))
    if _has(full, "decoder_sparse_step"):  # Qwen: every n-th layer has experts, except the layers in a list
        dense = [new for new, old in enumerate(layers) if not _is_sparse_in_qwen(full, old)]
        result |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if isinstance(full.get("attention_types"), list) and "attention_layers" in full:  # GPT-Neo
        result["attention_types"] = [[[full["attention_layers"][layer] for layer in layers], 1]]
    if _has(full, "moe_layer_interval"):  # ERNIE
        kinds = [_is_sparse_in_ernie(full, layer) for layer in layers]
        chosen = [number for number in numbers if kinds[number]]
        if not chosen:
            raise UserError(
                "student.layers: the student keeps no mixture-of-experts layer; transformers cannot build this "
                "architecture without one, so keep at least one"
            )
        start, end = chosen[0], chosen[-1]
        _choose(
            result,
            (
                {"moe_layer_interval": n, "moe_layer_start_index": start, "moe_layer_end_index": end}
                for n in _counts(layers)
            ),
            _is_sparse_in_ernie,
            kinds,
        )
    for kind in ("attn", "expert"):  # Jamba
        period, offset = f"{kind}_layer_period", f"{kind}_layer_offset"
        if _has(full, period):

            def is_chosen(values: Mapping[str, Any], layer: int, period: str = period, offset: str = offset) -> bool:
                return layer % values[period] == values[offset]

            candidates = ({period: n, offset: first} for n in _counts(layers) for first in range(n))
            _choose(result, candidates, is_chosen, [is_chosen(full, layer) for layer in layers])


def _has(values: Mapping[str, Any], key: str) -> bool:
    return isinstance(values.get(key), int)


def _counts(layers: Sequence[int]) -> range:
    return range(1, len(layers) + 2)


def _is_sparse_in_qwen(values: Mapping[str, Any], layer: int) -> bool:
    return layer not in (values.get("mlp_only_layers") or ()) and (layer + 1) % values["decoder_sparse_step"] == 0


def _is_sparse_in_ernie(values: Mapping[str, Any], layer: int) -> bool:
    start, end = values["moe_layer_start_index"], values["moe_layer_end_index"]
    return (layer + 1) % values["moe_layer_interval"] == 0 and start <= layer <= end


def _choose(result: dict[str, Any], candidates: Iterable[dict[str, int]], rule: Rule, kinds: list[bool]) -> None:
    """Updates `result` with the first candidate for which the rule gives each layer its kind.

    Raises:
        UserError: when no candidate does.
    """
    for candidate in candidates:
        if [rule(candidate, layer) for layer in range(len(kinds))] == kinds:
            result.update(candidate)
            return
    raise UserError(
        f"student.layers: these layers cannot be a model of their own: config.json gives the kinds of layers by a rule "
        f"({', '.join(candidate)}), and no such rule gives the kept ones theirs; keep others, for example the lowest "
        "ones (student.spacing: first)"
    )
