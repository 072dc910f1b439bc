"""The angles that layers turn states by, computed with transformers' own hidden states and plain numpy."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def plain_angles(folder: Path, documents: Sequence[torch.Tensor], size: int) -> tuple[np.ndarray, int]:
    """Returns the mean angle of each block of `size` layers of a Llama-like model, and the number of tokens.

    Each document is a pass of its own, in float64. Angles are in half turns.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.model.norm = torch.nn.Identity()  # transformers applies it to the last of the hidden states
    sums, count = np.zeros(1), 0
    for ids in documents:
        with torch.no_grad():
            states = model(ids[None], output_hidden_states=True).hidden_states
        states = np.stack([each[0].numpy() for each in states])  # [layers + 1, T, D]
        before, after = states[: len(states) - size], states[size:]
        lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        # A state of zeros, as the embedding of a padding token can be, counts as orthogonal to every other.
        cosines = (before * after).sum(-1) / np.where(lengths == 0, 1, lengths)
        sums = sums + np.arccos(np.clip(cosines, -1, 1)).sum(-1) / math.pi
        count += len(ids)
    return sums / count, count
