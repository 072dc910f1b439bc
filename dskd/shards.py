"""The annotated streaming shards: column schema, writing, reading, and collating to batches.

A sample is one sequence with the rows of the sense dictionary for each of its positions (docs/formats.md). The loader's
workers draw the positions that get a sense term, look up nothing but row numbers, and put the rows a micro-batch needs
beside its token ids: the training step gathers from those and never sees the dictionary.

Shapes: B samples, T tokens, K = kappa, R rows of the sense dictionary in a batch, D hidden.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset

from dskd.config import Config, LossConfig
from dskd.distributed import World
from dskd.errors import UserError
from dskd.manifest import Manifest, read_manifest, require_same, verify_files, write_json
from dskd.node_cache import streaming_names
from dskd.random_numbers import random_bits
from dskd.senses.dictionary import map_vectors
from dskd.sequences import position_ids_of

FOLDER = "shards"
MADE_BY = "deepspeed launcher/annotate.py --config FILE"
COLUMNS = {
    "input_ids": "ndarray:int32",
    "loss_mask": "ndarray:uint8",
    "document_starts": "ndarray:uint8",
    "sense_ids": "ndarray:int32",
    "synonym_ids": "ndarray:int32",
    "antonym_ids": "ndarray:int32",
}
# With `annotation.teacher_top_n`, beside the others.
TEACHER_COLUMNS = {
    "teacher_token_ids": "ndarray:int32",
    "teacher_logprobs": "ndarray:float16",
    "teacher_rest_logprob": "ndarray:float32",
}
_COMPRESSION, _HASH = "zstd", "xxh64"
_RELATION_DRAW, _OWN_DRAW = 0, 1


@dataclass(frozen=True)
class SensePositions:
    """Which positions get a sense term (method, section 4): a function of seed, epoch and sample, not of the rank."""

    seed: int
    relation_share: float
    min_relations: int

    @classmethod
    def of(cls, loss: LossConfig, seed: int) -> "SensePositions":
        """The rule of a run."""
        return cls(seed, loss.relation_share, loss.min_relations)

    def draw(self, sample: Mapping[str, np.ndarray], sample_id: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions for the relation term and for the own term, ascending.

        `relation_share` of the positions whose target has a synonym or antonym, but at least `min_relations` or all of
        them; and as many of the positions whose target has senses.
        """
        counts = sample["loss_mask"].astype(bool)
        lexical = np.flatnonzero(counts & ((sample["synonym_ids"][:, 0] >= 0) | (sample["antonym_ids"][:, 0] >= 0)))
        own = np.flatnonzero(counts & (sample["sense_ids"][:, 0] >= 0))
        wanted = min(len(lexical), max(round(self.relation_share * len(lexical)), self.min_relations))
        return self._first(lexical, wanted, sample_id, epoch, _RELATION_DRAW), self._first(
            own, wanted, sample_id, epoch, _OWN_DRAW
        )

    def _first(self, positions: np.ndarray, wanted: int, sample_id: int, epoch: int, draw: int) -> np.ndarray:
        priorities = random_bits(self.seed, draw, epoch, sample_id, torch.from_numpy(positions)).numpy()
        return np.sort(positions[np.argsort(priorities, kind="stable")[:wanted]])


class ShardDataset(StreamingDataset):
    """mosaicml-streaming's dataset, whose samples also say which they are and in which epoch they were read."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Set before a loader is iterated: its workers are copies of this object.
        self.current_epoch = 0

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """The columns of a sample, with `sample_id` and `epoch`."""
        sample = super().get_item(sample_id, retry)
        return {**sample, "sample_id": sample_id, "epoch": self.current_epoch}


class Collator:
    """Samples to a batch. With a dictionary, the sense rows that the drawn positions point to come with it."""

    def __init__(self, vectors_path: Path | None, positions: SensePositions | None) -> None:
        self._vectors_path = vectors_path
        self._positions = positions
        self._vectors: np.ndarray | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{input_ids [B, T], labels [B, T], loss_mask [B, T] bool, sample_ids [B]}, and `senses` with a dictionary.

        `position_ids` [B, T] are there where a document starts within a sequence.
        `senses` holds the tensors that :func:`dskd.losses.sense_sums` takes, with positions into B·T.
        """
        # mosaicml-streaming counts samples by the first value of a batch.
        batch: dict[str, Any] = collate_tokens(samples)
        if self._vectors_path is not None and self._positions is not None:
            if self._vectors is None:  # opened in the worker: a map must not be sent to another process
                self._vectors = map_vectors(self._vectors_path)
            batch["senses"] = self._collate_senses(samples, self._vectors, self._positions)
        return batch

    @staticmethod
    def _collate_senses(
        samples: Sequence[Mapping[str, Any]], vectors: np.ndarray, rule: SensePositions
    ) -> dict[str, torch.Tensor]:
        relation_positions, own_positions = [], []
        chosen: dict[str, list[np.ndarray]] = {"synonym_ids": [], "antonym_ids": [], "sense_ids": []}
        start = 0
        for sample in samples:
            relation, own = rule.draw(sample, sample["sample_id"], sample["epoch"])
            relation_positions.append(relation + start)
            own_positions.append(own + start)
            chosen["synonym_ids"].append(sample["synonym_ids"][relation])
            chosen["antonym_ids"].append(sample["antonym_ids"][relation])
            chosen["sense_ids"].append(sample["sense_ids"][own])
            start += len(sample["input_ids"])
        rows, (synonym, antonym, own_index) = gather_rows(vectors, [np.concatenate(ids) for ids in chosen.values()])
        return {
            "sense_rows": rows,
            "relation_positions": torch.from_numpy(np.concatenate(relation_positions)),
            "synonym_index": synonym,
            "antonym_index": antonym,
            "own_positions": torch.from_numpy(np.concatenate(own_positions)),
            "own_index": own_index,
        }


def collate_tokens(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Token ids, labels and masks of samples of one length, as int64 and bool.

    `position_ids` [B, T] are there only where a document starts within a sequence.
    """
    input_ids = torch.from_numpy(np.stack([sample["input_ids"] for sample in samples])).long()
    starts = torch.from_numpy(np.stack([sample["document_starts"] for sample in samples]))
    position_ids = position_ids_of(starts)
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return {
        "input_ids": input_ids,
        "labels": torch.cat([input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])], dim=1),
        "loss_mask": torch.from_numpy(np.stack([sample["loss_mask"] for sample in samples])).bool(),
        "sample_ids": torch.tensor([sample["sample_id"] for sample in samples]),
        **positions,
    }


def gather_rows(vectors: np.ndarray, row_ids: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Reads each row that is named once.

    Args:
        vectors: [all rows, D], the raw bits of bf16.
        row_ids: arrays of row numbers of any shape, padded with -1.

    Returns:
        The rows [R, D] bf16, and for each array of `row_ids` the indices into them, int64 of the same shape, padded
        with -1.
    """
    flat = np.concatenate([ids.ravel() for ids in row_ids])
    unique, inverse = np.unique(flat, return_inverse=True)
    padding = int(len(unique) > 0 and unique[0] < 0)
    inverse = inverse.reshape(-1) - padding  # row numbers start behind the -1, if there is one
    rows = np.asarray(vectors[unique[padding:]])
    pieces = np.split(inverse, np.cumsum([ids.size for ids in row_ids])[:-1])
    indices = [torch.from_numpy(piece.reshape(ids.shape)) for piece, ids in zip(pieces, row_ids, strict=True)]
    return torch.from_numpy(rows).view(torch.bfloat16), indices


# ------------------------------------------------------------------------------------------------------------- writing


def columns_of(config: Config) -> dict[str, str]:
    """{column: its encoding} of the shards that annotation writes."""
    return COLUMNS | (TEACHER_COLUMNS if config.annotation.teacher_top_n else {})


def write_block(
    folder: Path, samples: Iterator[Mapping[str, np.ndarray]], columns: Mapping[str, str] = COLUMNS
) -> None:
    """Writes samples as a folder with exactly one shard; :func:`join_blocks` makes one dataset of many."""
    with MDSWriter(
        out=str(folder), columns=dict(columns), compression=_COMPRESSION, hashes=[_HASH], size_limit=None
    ) as writer:
        for sample in samples:
            writer.write(dict(sample))


def join_blocks(folder: Path, blocks: Sequence[Path]) -> int:
    """Makes one dataset in `folder` of the shards of `blocks`, in their order. The blocks stay as they are.

    The result does not depend on which rank wrote which block.

    Returns:
        The number of samples.
    """
    shards = []
    for number, block in enumerate(blocks):
        for shard in json.loads((block / "index.json").read_text())["shards"]:
            for part, suffix in (("raw_data", ".mds"), ("zip_data", f".mds.{_COMPRESSION}")):
                old = block / shard[part]["basename"]
                shard[part]["basename"] = f"shard.{number:05d}{suffix}"
                if old.is_file():
                    _link(old, folder / shard[part]["basename"])
            shards.append(shard)
    write_json(folder / "index.json", {"shards": shards, "version": 2})
    return sum(shard["samples"] for shard in shards)


def _link(old: Path, new: Path) -> None:
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:  # not every file system has hard links
        shutil.copyfile(old, new)


# ------------------------------------------------------------------------------------------------------------- reading


def load_manifest(config: Config, split: str) -> Manifest:
    """The manifest of `WORKDIR/shards/SPLIT`.

    Raises:
        UserError: when the shards are missing or were damaged.
    """
    return read_manifest(config.path(FOLDER, split), "shards", made_by=MADE_BY)


def require_fitting(
    config: Config, split: str, manifest: Manifest, *, senses: str, teacher: str, tokenizer: str
) -> None:
    """Refuses shards made with another sense dictionary, teacher or tokenizer, or changed since.

    Raises:
        UserError: naming both sides, or the file that was changed.
    """
    folder = config.path(FOLDER, split)
    remedy = f"make the shards anew with `{MADE_BY}`"
    for what, expected, found in (
        ("tokenizers", tokenizer, manifest.tokenizer),
        ("teachers", teacher, manifest.teacher),
        ("sense dictionaries", senses, manifest.inputs.get("senses")),
    ):
        require_same(what, expected=expected, found=found, between=f"{folder} and what is here now", remedy=remedy)
    verify_files(folder, manifest, made_by=MADE_BY)


def open_shards(config: Config, split: str, cache: Path, world: World, **options: Any) -> ShardDataset:
    """The dataset of a split; shards are unpacked into `cache`, and the artifact itself is never written to.

    Every rank must call it.
    """
    with streaming_names(cache, world):
        return ShardDataset(
            remote=str(config.path(FOLDER, split).resolve()),
            local=str(cache / split),
            validate_hash=_HASH,
            keep_zip=False,
            **options,
        )


def require_samples(manifest: Manifest, folder: Path, needed: int, what: str) -> None:
    """Refuses shards with fewer samples than one global batch.

    Raises:
        UserError: with both numbers.
    """
    samples = manifest.facts["samples"]
    if samples < needed:
        raise UserError(f"{folder}: there are {samples} samples, fewer than {what} ({needed}); lower it, or add text")
