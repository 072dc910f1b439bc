"""Greedy generation with a frozen model, in batches."""

from typing import Any

import torch
from torch.nn import functional as F

from dskd.models.folder import ModelFolder
from dskd.models.frozen import FrozenModel


def generate_greedily(
    model: FrozenModel, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, count: int, last_position: int
) -> torch.Tensor:
    """The `count` most probable next tokens [B, count] behind the first tokens of each row, one after the other.

    Ends of text do not end it: all ranks must make equally many passes, and must call this equally often.

    Args:
        model: with its output matrix.
        input_ids: [B, T], padded on the right.
        prompt_lengths: [B], how many tokens of each row to go on with, at least 1.
        count: how many are generated.
        last_position: those beyond it are generated at it, for a model may know no other; they are not to be kept.
    """
    from transformers import DynamicCache

    width = int(prompt_lengths.max())
    # [B, P]: the column of each place in the row it is taken from; negative on the left of the text.
    source = torch.arange(width) - (width - prompt_lengths[:, None])
    tokens = input_ids.gather(1, source.clamp(min=0))
    mask = (source >= 0).long()
    positions = source.clamp(min=0)
    cache: Any = DynamicCache()
    added = []
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
    """The token that packing puts at the end of a text (None when there is none), and all that end a generation.

    Those are the tokenizer's and the model's own: chat models have several.
    """
    tokenizer = folder.load_tokenizer()
    text_end = next((i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), None)
    of_model = folder.load_config().eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return text_end, sorted({token for token in (text_end, *of_model) if token is not None})


def _most_probable_last(hidden: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """The most probable token [B, 1] behind the last of the states [B, T, D]."""
    return F.linear(hidden[:, -1:], head_weight).argmax(-1)
