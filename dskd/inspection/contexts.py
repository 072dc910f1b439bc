"""Example contexts from the training shards: places whose nearest sense is a given row of the sense dictionary.

The shards are read from their files (:mod:`dskd.artifacts.mds`): mosaicml-streaming's own datasets would unpack them
into a cache, and take names in shared memory that a training on this machine uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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

_TOKENS_BEFORE, _TOKENS_AFTER = 16, 8


@dataclass(frozen=True)
class Contexts:
    """Places found for each of some rows, in the order of the shards, as text with the target between « and »."""

    of_row: dict[int, list[str]]
    samples_read: int
    samples: int  # in all shards


def open_training_shards(config: Config, senses: Manifest) -> tuple[Path, Manifest]:
    """The training shards' folder and manifest.

    Raises:
        UserError: when there are none, or their row numbers are those of another sense dictionary.
    """
    folder = config.path(kinds.SHARDS.folder, "train")
    manifest = load_manifest(config, "train")
    require_same(
        "sense dictionaries",
        expected=senses.digest,
        found=manifest.inputs.get("senses"),
        between=f"{folder} and the sense dictionary that is here now",
        remedy=f"make the shards again with `{kinds.SHARDS.made_by}`",
    )
    return folder, manifest


def find_contexts(
    folder: Path, samples: int, rows: range, tokenizer: Any, *, of_synonyms: bool, wanted: int, scan: int
) -> Contexts:
    """Up to `wanted` places for each of `rows` among the first `scan` samples; stops when every row has enough.

    Args:
        folder: the shards.
        samples: how many there are.
        rows: rows of the sense dictionary, of one entry.
        tokenizer: the teacher's.
        of_synonyms: instead of the places where a row is the first of O_i, the target's own nearest sense, those where
            it is in P_i: that is what there is of a span, which is never a target itself.
        wanted: places a row.
        scan: samples that are read at most.
    """
    found: dict[int, list[str]] = {row: [] for row in rows}
    some = min(scan, samples)
    read = 0
    for sample in progress(
        islice(read_samples(folder / INDEX), some), total=some, label="finding contexts", unit="samples"
    ):
        if all(len(places) >= wanted for places in found.values()):
            break
        read += 1
        ids = sample["synonym_ids"] if of_synonyms else sample["sense_ids"][:, :1]
        for position, rank in np.argwhere((ids >= rows.start) & (ids < rows.stop)).tolist():
            places = found[int(ids[position, rank])]
            if len(places) < wanted:
                places.append(render_context(tokenizer, sample["input_ids"].tolist(), position + 1))
    return Contexts(found, read, samples)


def render_context(tokenizer: Any, input_ids: Sequence[int], target: int) -> str:
    """A window of text around the token at `target`, which stands between « and ». It ends where a document does."""
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    left, right = target, target + 1
    while left > max(0, target - _TOKENS_BEFORE) and input_ids[left - 1] not in ends:
        left -= 1
    while right < min(len(input_ids), target + 1 + _TOKENS_AFTER) and input_ids[right] not in ends:
        right += 1
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
