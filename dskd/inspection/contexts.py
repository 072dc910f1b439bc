"""Example contexts from the training shards: places whose nearest sense is a certain row of the sense dictionary.

The shards are read directly from their files (:mod:`dskd.artifacts.mds`). Datasets of mosaicml-streaming would unpack
them into a cache, and claim names in shared memory that a training run on the same machine uses.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, require_same
from dskd.artifacts.mds import INDEX, read_samples
from dskd.config import Config
from dskd.console import progress
from dskd.shards import load_manifest
from dskd.shards.schema import OWN_ROWS, SYNONYM_ROWS

_TOKENS_BEFORE, _TOKENS_AFTER = 16, 8


def open_training_shards(config: Config, senses: Manifest) -> tuple[Path, Manifest]:
    """Returns the training shards' folder and manifest. Raises a UserError when there are none, or their row numbers
    refer to another sense dictionary.
    """
    folder = config.path(kinds.SHARDS.folder, "train")
    manifest = load_manifest(config, "train")
    require_same(
        "sense dictionaries",
        expected=senses.digest,
        actual=manifest.inputs.get("senses"),
        between=f"{folder} and the sense dictionary that is here now",
        remedy=f"make the shards again with `{kinds.SHARDS.made_by}`",
    )
    return folder, manifest


def find_contexts(
    folder: Path, samples: int, rows: range, tokenizer: Any, *, of_synonyms: bool, per_row: int, scan: int
) -> tuple[dict[int, list[str]], int]:
    """Finds up to `per_row` places for each of `rows` among the first `scan` samples; stops when every row has enough.

    `samples` is the number of samples in the shards' folder, and `rows` are rows of one entry of the sense dictionary.
    `of_synonyms` finds the places where a row is in P_i, not those where it is the first of O_i, the target's own
    nearest sense. Only the former exist for a span, which is never a target itself.

    Returns the places of each row, in the order of the shards, as text with the target between « and »; and the number
    of samples read.
    """
    places: dict[int, list[str]] = {row: [] for row in rows}
    most = min(scan, samples)
    samples_read = 0
    for sample in progress(
        islice(read_samples(folder / INDEX, columns=("input_ids", OWN_ROWS, SYNONYM_ROWS)), most),
        total=most,
        label="finding contexts",
        unit="samples",
    ):
        if all(len(of_row) >= per_row for of_row in places.values()):
            break
        samples_read += 1
        numbers = sample[SYNONYM_ROWS] if of_synonyms else sample[OWN_ROWS][:, :1]
        for position, rank in np.argwhere((numbers >= rows.start) & (numbers < rows.stop)).tolist():
            of_row = places[int(numbers[position, rank])]
            if len(of_row) < per_row:
                of_row.append(render_context(tokenizer, sample["input_ids"].tolist(), position + 1))
    return places, samples_read


def render_context(tokenizer: Any, input_ids: Sequence[int], target: int) -> str:
    """Returns a window of text around the token at `target`, with that token between « and ».

    The window does not reach beyond the token's document.
    """
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    left, right = target, target + 1
    while left > max(0, target - _TOKENS_BEFORE) and input_ids[left - 1] not in ends:
        left -= 1
    while right < min(len(input_ids), target + 1 + _TOKENS_AFTER) and input_ids[right] not in ends:
        right += 1
    # A tokenizer may decode a token by itself differently, so decode three prefixes of the window and take differences.
    before, upto, whole = (
        tokenizer.decode(list(input_ids[left:stop]), clean_up_tokenization_spaces=False)
        for stop in (target, target + 1, right)
    )
    word = upto[len(before) :]
    space = word[: len(word) - len(word.lstrip())]
    text = " ".join(f"{before}{space}«{word.strip()}»{whole[len(upto) :]}".split())
    cut_left = left > 0 and input_ids[left - 1] not in ends
    cut_right = right < len(input_ids) and input_ids[right] not in ends
    return f"{'… ' if cut_left else ''}{text}{' …' if cut_right else ''}"
