"""Limits that a model puts on text: how many positions it has, and which tokens.

Without these checks a forward pass would exceed the limits, and fail with an IndexError on a CPU or with a device error
on a GPU.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dskd.config import Config
from dskd.errors import UserError, listed
from dskd.models.tokenizing import require_known, text_end

# Kinds of RoPE scaling whose config.json may name the positions before scaling in max_position_embeddings too.
_SCALED = ("linear", "yarn")


def position_limit(model_config: Any) -> int | None:
    """Returns how many positions a model has, or was trained for; None if its config does not limit them.

    Models with learned positions cannot run on more. Models with rotary positions can, but were not trained on them.
    Most files have the number after scaling in `max_position_embeddings`; if a file names the one before scaling,
    that number times the factor is a limit too, and the larger one counts.
    """
    text = model_config.get_text_config()
    if getattr(text, "alibi", False) or _attention_setting(text, "alibi") or text.model_type == "bloom":
        return None
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    kind, scaling = rope_scaling(text)
    original, factor = original_positions(text), scaling.get("factor")
    if kind in _SCALED and original and isinstance(factor, (int, float)):
        return max(limit, int(original * factor))
    return limit


def original_positions(model_config: Any) -> int | None:
    """Returns the number of positions before RoPE scaling; None if config.json does not name it."""
    key = "original_max_position_embeddings"
    positions = getattr(model_config, key, None) or rope_scaling(model_config)[1].get(key)
    return positions if isinstance(positions, int) else None


def rope_scaling(model_config: Any) -> tuple[str | None, dict[str, Any]]:
    """Returns the kind of RoPE scaling and its settings, under the names of transformers 4 or 5; (None, {}) if none."""
    scaling = getattr(model_config, "rope_scaling", None) or getattr(model_config, "rope_parameters", None) or {}
    return scaling.get("rope_type", scaling.get("type")), scaling


def vocabulary_size(model_config: Any) -> int | None:
    """Returns the number of tokens that a model has; None if its config does not say."""
    size = getattr(model_config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def check_limits(config: Config, folder: Path, model_config: Any, tokenizer: Any) -> None:
    """Refuses sequences with more tokens than the model has positions, and end-of-text tokens that the model lacks.

    Raises:
        UserError: with everything that does not fit, and for each both numbers.
    """
    problems = []
    limit = position_limit(model_config)
    length = config.corpus.sequence_length
    if limit is not None and length > limit:
        problems.append(
            f"corpus.sequence_length: {length} is more than the {limit} positions that the model was made for "
            f"(max_position_embeddings of its config.json); set it to {limit} at most"
        )
    size = vocabulary_size(model_config)
    inserted = [text_end(tokenizer), *tokenizer("", verbose=False)["input_ids"]]
    for token in dict.fromkeys(inserted):
        if size is None or token is None or token < size:
            continue
        problems.append(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(token)!r} at the ends of texts, whose id is {token}, "
            f"but the model has {size} tokens (vocab_size of its config.json), 0 to {size - 1}; use the tokenizer that "
            "belongs to it, or give it more embeddings (model.resize_token_embeddings(len(tokenizer))) and save both"
        )
    if problems:
        raise UserError(listed(f"text and model do not fit together ({folder})", problems))


def check_new_tokens(key: str, new_tokens: int, folder: Path, model_config: Any) -> None:
    """Refuses a number of new tokens that leaves no position for a prompt.

    Raises:
        UserError: with both numbers.
    """
    limit = position_limit(model_config)
    if limit is not None and new_tokens >= limit:
        raise UserError(
            f"{key}: {new_tokens} leaves no room for a prompt in the {limit} positions that {folder} has; lower it",
            known_to_all_ranks=True,
        )


def check_text(tokens: Sequence[int], model_config: Any, tokenizer: Any, text_name: str) -> None:
    """Refuses a text that has tokens that the model lacks, or more tokens than the model has positions.

    Args:
        tokens: the text's token ids.
        model_config: the model's config.
        tokenizer: the tokenizer that made the tokens.
        text_name: what the text is, for messages.

    Raises:
        UserError: with the numbers of what does not fit.
    """
    require_known(tokens, vocabulary_size(model_config), tokenizer, text_name)
    limit = position_limit(model_config)
    if limit is not None and len(tokens) > limit:
        raise UserError(
            f"{text_name}: it has {len(tokens)} tokens, which is more than the {limit} positions of the model; remove "
            "or shorten it"
        )


def _attention_setting(text: Any, key: str) -> Any:
    attention = getattr(text, "attn_config", None)  # MPT has one
    return attention.get(key) if isinstance(attention, dict) else getattr(attention, key, None)
