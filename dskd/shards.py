"""The annotated streaming shards: column schema, writing, reading, and collating to batches.

A sample is one sequence with the rows of the sense dictionary for each of its positions (docs/formats.md). The loader's
workers draw the positions that get a sense term, look up nothing but row numbers, and put the rows a micro-batch needs
beside its token ids: the training step gathers from those, or, by row number, from all rows if the device holds them.

Shapes: B samples, T tokens, K = kappa, R rows of the sense dictionary in a batch, D hidden.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from streaming.base.storage.download import CloudDownloader

from dskd.candidates import Candidates
from dskd.config import Config, LossConfig
from dskd.distributed import World, on_main
from dskd.errors import OutageError, UserError
from dskd.manifest import Manifest, read_manifest, require_same, sha256_of_file, verify_files, write_json
from dskd.mds import INDEX
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
_LENGTH_MULTIPLE = 8  # lengths of micro-batches: what tensor cores like
_COMPRESSION, _HASH = "zstd", "xxh64"
_REMOTE_TIMEOUT_S = 60.0
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
        lexical = np.flatnonzero(counts & _is_lexical(sample))
        own = np.flatnonzero(counts & (sample["sense_ids"][:, 0] >= 0))
        wanted = min(len(lexical), max(round(self.relation_share * len(lexical)), self.min_relations))
        return self._first(lexical, wanted, sample_id, epoch, _RELATION_DRAW), self._first(
            own, wanted, sample_id, epoch, _OWN_DRAW
        )

    def _first(self, positions: np.ndarray, wanted: int, sample_id: int, epoch: int, draw: int) -> np.ndarray:
        priorities = random_bits(self.seed, draw, epoch, sample_id, torch.from_numpy(positions)).numpy()
        return np.sort(positions[np.argsort(priorities, kind="stable")[:wanted]])


def _is_lexical(sample: Mapping[str, np.ndarray]) -> np.ndarray:
    """[T] bool: the target has a synonym or antonym."""
    return (sample["synonym_ids"][:, 0] >= 0) | (sample["antonym_ids"][:, 0] >= 0)


class ShardDataset(StreamingDataset):
    """mosaicml-streaming's dataset, whose samples also say which they are, and in which epoch and step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Set by whoever iterates it, in the process that does.
        self.current_epoch = 0
        self.current_step = 0
        self.failure: BaseException | None = None  # why iterating it ended early

    def on_exception(self, future: Future) -> None:
        """Keeps why shards could not be fetched. The library raises it in a thread of its own, where nobody hears it,
        and the iteration just ends.
        """
        if error := future.exception():
            self.failure = error
            self._event.set()

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """The columns of a sample, with `sample_id`, `epoch` and `step`."""
        sample = super().get_item(sample_id, retry)
        return {**sample, "sample_id": sample_id, "epoch": self.current_epoch, "step": self.current_step}


class Collator:
    """A rank's samples of one optimizer step to its micro-batches: sorted by length, each as long as its longest."""

    def __init__(
        self,
        vectors_path: Path | None,
        positions: SensePositions | None,
        *,
        micro_batch_size: int,
        candidates: Candidates | None = None,
        lexical: bool = False,
        teacher_cache: bool = False,
    ) -> None:
        """What comes with the tokens.

        Args:
            vectors_path: the sense dictionary, to read the rows from that a micro-batch points to; None: it points
                into the whole dictionary.
            positions: which positions get a sense term; None: none do.
            micro_batch_size: samples a micro-batch.
            candidates: which rows teacher and student are compared over; None: the student's distances to rows count.
            lexical: bring which targets have a synonym or antonym.
            teacher_cache: bring the teacher's stored distributions.
        """
        self._vectors_path = vectors_path
        self._positions = positions
        self._micro_batch_size = micro_batch_size
        self._candidates = candidates
        self._lexical = lexical
        self._teacher_cache = teacher_cache
        self._vectors: np.ndarray | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Micro-batches of B samples, trimmed to T tokens: what :func:`collate_tokens` gives, and as asked for.

        `senses`: the tensors that :func:`dskd.sense_losses.sense_loss` takes, or with `candidates` those that
        :func:`dskd.sense_losses.sense_divergence` takes, with positions into B·T. Without `vectors_path` `sense_rows`
        [R, D] is not among them, and indices are row numbers of the dictionary.

        `lexical`: [B, T] bool.

        `teacher_cache`: {token_ids [B, T, n] int32, logprobs [B, T, n] float16, rest_logprob [B, T] float32}.
        """
        if self._vectors_path is not None and self._vectors is None:
            self._vectors = map_vectors(self._vectors_path)  # in the worker: a map must not be sent to another process
        # The longest first: what does not fit the device fails at once, and later ones reuse its memory.
        ordered = sorted(samples, key=lambda sample: -_real_length(sample))
        size = self._micro_batch_size
        return [self._collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def _collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        length = _trimmed_length(samples)
        batch: dict[str, Any] = collate_tokens(samples, length)
        if self._positions is not None:
            named = _name_rows(samples, length, self._positions, self._candidates)
            batch["senses"] = _point_to_rows(named, self._vectors)
        if self._lexical:
            batch["lexical"] = torch.from_numpy(np.stack([_is_lexical(sample)[:length] for sample in samples]))
        if self._teacher_cache:
            batch["teacher_cache"] = {
                name.removeprefix("teacher_"): torch.from_numpy(np.stack([sample[name][:length] for sample in samples]))
                for name in TEACHER_COLUMNS
            }
        return batch


def _real_length(sample: Mapping[str, Any]) -> int:
    """Positions up to the last one whose target counts: no loss depends on what follows in a causal model."""
    counted = np.flatnonzero(sample["loss_mask"])
    return int(counted[-1]) + 1 if len(counted) else 0


def _trimmed_length(samples: Sequence[Mapping[str, Any]]) -> int:
    longest = max(1, *(_real_length(sample) for sample in samples))
    return min(len(samples[0]["input_ids"]), -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)


_RowsByName = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def _name_rows(
    samples: Sequence[Mapping[str, Any]], length: int, rule: SensePositions, candidates: Candidates | None
) -> _RowsByName:
    """What a sense loss takes: {name: positions into B·T}, and {name: row numbers of the dictionary}."""
    drawn = [rule.draw(sample, sample["sample_id"], sample["epoch"]) for sample in samples]
    if candidates is not None:
        # Both draws, and a position of both once: with any candidates the positions are the same.
        at = [np.union1d(*of_sample) for of_sample in drawn]
        shared = candidates.draw(samples[0]["step"])
        rows = [candidates.of_positions(sample, where, shared) for sample, where in zip(samples, at, strict=True)]
        return {"positions": _in_batch(at, length)}, {"candidate_index": np.concatenate(rows), "random_index": shared}
    relation, own = zip(*drawn, strict=True)

    def column(name: str, at: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([sample[name][where] for sample, where in zip(samples, at, strict=True)])

    return {"relation_positions": _in_batch(relation, length), "own_positions": _in_batch(own, length)}, {
        "synonym_index": column("synonym_ids", relation),
        "antonym_index": column("antonym_ids", relation),
        "own_index": column("sense_ids", own),
    }


def _in_batch(positions: Sequence[np.ndarray], length: int) -> np.ndarray:
    return np.concatenate([of_sample + number * length for number, of_sample in enumerate(positions)])


def _point_to_rows(named: _RowsByName, vectors: np.ndarray | None) -> dict[str, torch.Tensor]:
    """The same as tensors; with `vectors` the rows are among them, and row numbers are indices into those."""
    positions, row_ids = named
    rows = {}
    if vectors is None:
        indices = [torch.from_numpy(ids).long() for ids in row_ids.values()]
    else:
        rows["sense_rows"], indices = gather_rows(vectors, list(row_ids.values()))
    at = {name: torch.from_numpy(values) for name, values in positions.items()}
    return {**rows, **at, **dict(zip(row_ids, indices, strict=True))}


def collate_tokens(samples: Sequence[Mapping[str, Any]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Token ids, labels and masks of samples of one length, as int64 and bool.

    {input_ids [B, T], labels [B, T], loss_mask [B, T] bool, sample_ids [B]}, and `position_ids` [B, T] only where a
    document starts within a sequence. T is `length`, or all of the samples' tokens.
    """
    whole = len(samples[0]["input_ids"])
    length = whole if length is None else length
    # One token more: it is the label of the last position.
    tokens = torch.from_numpy(np.stack([sample["input_ids"][: length + 1] for sample in samples])).long()
    labels = tokens[:, 1:] if length < whole else torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    position_ids = position_ids_of(torch.from_numpy(np.stack([s["document_starts"][:length] for s in samples])))
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return {
        "input_ids": tokens[:, :length],
        "labels": labels,
        "loss_mask": torch.from_numpy(np.stack([sample["loss_mask"][:length] for sample in samples])).bool(),
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


def columns_of(*, teacher_top_n: int) -> dict[str, str]:
    """{column: its encoding} of the shards that annotation writes."""
    return COLUMNS | (TEACHER_COLUMNS if teacher_top_n else {})


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
        UserError: when the shards are missing or were damaged; of a remote copy only the manifest has to be here.
    """
    here = config.train.shard_remote is None
    return read_manifest(config.path(FOLDER, split), "shards", made_by=MADE_BY, files_are_here=here)


def require_fitting(
    config: Config, split: str, manifest: Manifest, *, senses: str, teacher: str, tokenizer: str
) -> None:
    """Refuses shards made with another sense dictionary, teacher or tokenizer, or changed since.

    Those of a remote copy are verified one by one when they are read (:func:`open_shards`).

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
    if config.train.shard_remote is None:
        verify_files(folder, manifest, made_by=MADE_BY)


def require_teacher_cache(config: Config, split: str, manifest: Manifest) -> None:
    """Refuses shards without the teacher's distributions, or with those over another number of tokens.

    Raises:
        UserError: naming the command that makes them anew.
    """
    wanted, found = config.annotation.teacher_top_n, manifest.config.get("teacher_top_n")
    if found and found != wanted:
        raise UserError(
            f"annotation.teacher_top_n: {wanted}, but {config.path(FOLDER, split)} holds the teacher's {found} most "
            f"probable tokens; set it to {found}, or make the shards anew with `{MADE_BY}`"
        )
    if not found:
        raise UserError(
            f"{config.path(FOLDER, split)}: the shards hold no distributions of the teacher, and teacher.mode: cached "
            f"with loss.kd_weight {config.loss.kd_weight:g} reads them; set annotation.teacher_top_n (64, say) and "
            f"make the shards anew with `{MADE_BY}`"
        )


def open_shards(config: Config, split: str, cache: Path, world: World, **options: Any) -> ShardDataset:
    """The dataset of a split; shards are unpacked into `cache`, and the artifact itself is never written to.

    A remote copy is trusted as far as its index is the artifact's own, for that has the hash of each shard, which
    mosaicml-streaming compares. Every rank must call it.

    Raises:
        UserError: when the remote copy is of other shards, or cannot be read.
    """
    if config.train.shard_remote is not None:
        on_main(
            lambda: require_remote(config, split)
        )  # in streaming all ranks but one would wait for what does not come
    with streaming_names(cache, world):
        dataset = ShardDataset(
            remote=place(config, split),
            local=str(cache / split),
            validate_hash=_HASH,
            keep_zip=False,
            **options,
        )
    if config.train.shard_remote is not None:
        _require_same_index(config, split, cache / split / INDEX)
    return dataset


def place(config: Config, split: str) -> str:
    """Where a split's shards are read from."""
    if config.train.shard_remote is None:
        return str(config.path(FOLDER, split).resolve())
    return f"{config.train.shard_remote.rstrip('/')}/{split}"


def require_remote(config: Config, split: str) -> None:
    """Looks whether the remote copy of a split can be read from this node, and is a copy of these very shards.

    Raises:
        UserError: when it has no index, or that of other shards; an OutageError when it cannot be reached.
    """
    remote = f"{place(config, split)}/{INDEX}"
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / INDEX
        try:
            CloudDownloader.get(remote).direct_download(remote, str(index), timeout=_REMOTE_TIMEOUT_S)
        except Exception as error:  # of each store its own kind
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise (UserError if is_lasting(error) else OutageError)(
                f"train.shard_remote: {remote} cannot be read ({reason}); copy {config.path(FOLDER)} there, correct "
                "the address, or see to the access (credentials, network)"
            ) from error
        _require_same_index(config, split, index)


def is_lasting(error: Exception) -> bool:
    """Whether what went wrong with a remote copy would go wrong again: what is asked for is not there, is another, or
    may not be read. Anything else (network, server) may mend itself.
    """
    if isinstance(error, (FileNotFoundError, PermissionError, ValueError, ImportError)):
        return True
    # Amazon's library has one class for all that a server answers, and may not be installed.
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return code in ("403", "404", "AccessDenied", "NoSuchKey", "NoSuchBucket") or (
        type(error).__name__ == "NoCredentialsError"
    )


def _require_same_index(config: Config, split: str, index: Path) -> None:
    expected = load_manifest(config, split).files[INDEX]["sha256"]
    found = sha256_of_file(index)
    if found != expected:
        raise UserError(
            f"{place(config, split)}: its {INDEX} is not that of {config.path(FOLDER, split)} (sha256 {found[:12]}…, "
            f"expected {expected[:12]}…): it has other shards; copy {config.path(FOLDER)} there anew, or correct "
            "train.shard_remote",
            known_to_all_ranks=True,
        )


def require_samples(manifest: Manifest, folder: Path, needed: int, what: str) -> None:
    """Refuses shards with fewer samples than one global batch.

    Raises:
        UserError: with both numbers.
    """
    samples = manifest.facts["samples"]
    if samples < needed:
        raise UserError(f"{folder}: there are {samples} samples, fewer than {what} ({needed}); lower it, or add text")
