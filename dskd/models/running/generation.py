"""Greedy generation with a frozen model, in batches, and the tokens at which a generation ends."""

import itertools
import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dskd.models.files.folder import ModelFolder
from dskd.models.limits import vocabulary_size
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.readouts import predict
from dskd.models.structure.output_head import OutputHead
from dskd.models.tokenizing import answer_end, text_end

GENERATION_CONFIG = "generation_config.json"


def generate_greedily(
    model: FrozenModel, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, count: int, last_position: int
) -> torch.Tensor:
    """Generates `count` tokens [B, count] after the prompt of each row, the most probable token at each step.

    An end-of-text token does not stop generation, since all ranks must make the same number of forward passes. All
    ranks must also call this equally often.

    Args:
        model: the model, loaded with its output matrix.
        input_ids: [B, T], padded on the right.
        prompt_lengths: [B], the number of tokens of each row that form its prompt, at least 1.
        count: the number of tokens to generate.
        last_position: the highest position used. Tokens past it are generated at this position too, since the model may
            have no others; the caller should drop them.
    """
    from transformers import DynamicCache

    width = int(prompt_lengths.max())
    # Prompts are moved to the right edge, so that their last tokens are in one column. `source` [B, P] has, for each
    # place, the column of `input_ids` that its token comes from; it is negative in the padding on the left.
    source = torch.arange(width) - (width - prompt_lengths[:, None])
    tokens = input_ids.gather(1, source.clamp(min=0))
    mask = (source >= 0).long()
    positions = source.clamp(min=0)
    cache: Any = DynamicCache()
    added = []
    # The first pass runs the whole prompts. Each later one runs the token just generated, on the cache of those before.
    for _ in range(count):
        tokens = model.read(
            tokens,
            positions,
            _most_probable_last,
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            use_cache=True,
        ).cpu()
        added.append(tokens)
        positions = (positions[:, -1:] + 1).clamp(max=last_position)
        mask = F.pad(mask, (0, 1), value=1)
    return torch.cat(added, dim=1)


def end_tokens(folder: ModelFolder) -> tuple[int | None, list[int]]:
    """Returns the token that packing puts at the end of a text (None if there is none), and all that end a generation.

    The latter are that token, those of config.json, and those that end an answer: chat models have several.
    """
    end, ends = text_end(folder.tokenizer), _config_ends(folder)
    return end, sorted({*as_list(end), *ends, *answer_ends(folder)})


def ends_of_answers_only(folder: ModelFolder) -> list[int]:
    """Returns the tokens that end a generation and that neither the tokenizer nor config.json names as an end.

    The digest of a model does not depend on them, so recipes of generated text name them.
    """
    end, ends = end_tokens(folder)
    return sorted({*ends} - {*as_list(end), *_config_ends(folder)})


def answer_ends(folder: ModelFolder) -> list[int]:
    """Returns the tokens that end the answer to a chat: those of the generation config, and the chat template's.

    The former are those of config.json if there is no generation config, or it names none.
    """
    tokenizer = folder.tokenizer
    named = as_list(generation_values(folder.path).get("eos_token_id")) or _config_ends(folder)
    ends = named or as_list(text_end(tokenizer))
    of_template, vocab_size = answer_end(tokenizer), vocabulary_size(folder.load_config())
    if of_template is None or of_template in ends or (vocab_size is not None and of_template >= vocab_size):
        return ends
    return [*ends, of_template]


def _config_ends(folder: ModelFolder) -> list[int]:
    return as_list(folder.load_config().eos_token_id)


def generation_values(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's generation config; {} if it has none, or a damaged one."""
    try:
        values = json.loads((folder / GENERATION_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def as_list(tokens: int | list[int] | None) -> list[int]:
    """Returns token ids as a list: configs have one, several or none."""
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, list) else [tokens]


def before_end(tokens: Iterable[int], ends: Container[int]) -> list[int]:
    """Returns the generated tokens before the first of `ends`."""
    return [*itertools.takewhile(lambda token: token not in ends, tokens)]


def _most_probable_last(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Returns the most probable next token [B, 1] after the last of the states [B, T, D]."""
    return predict(hidden[:, -1], head)[:, None]
