"""Documents to token sequences: `WORKDIR/sequences`, what every later stage reads.

Documents are tokenized by the teacher's tokenizer and packed to `corpus.sequence_length`. Nothing but the evaluation
reads the held-out part.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.corpus import BATCH_DOCUMENTS, MADE_BY, SPLITS, read_texts
from dskd.corpus import FOLDER as CORPUS_FOLDER
from dskd.manifest import Manifest, Recipe, build_artifact, read_manifest, require_same

FOLDER = "sequences"


@dataclass(frozen=True)
class TokenBatch:
    """Sequences as the models read them: B sequences of T tokens."""

    input_ids: torch.Tensor  # [B, T] int64
    position_ids: torch.Tensor | None  # [B, T] int64, from 0 in each document; None where they only count up
    has_target: torch.Tensor  # [B, T] bool, True where x_{i+1} goes on with the document of x_i
    num_tokens: int  # real ones

    def without_targets(self) -> "TokenBatch":
        """The same tokens for a rank that has no work left, and must still take part in a forward pass."""
        return replace(self, has_target=torch.zeros_like(self.has_target), num_tokens=0)


@dataclass(frozen=True)
class Sequences:
    """Packed token sequences on disk: S sequences of T tokens, read by slices through a memory map.

    `lengths` [S] counts the real tokens of each; what follows is padding that no loss looks at.
    """

    path: Path
    lengths: torch.Tensor
    sequence_length: int

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Real tokens in all sequences."""
        return int(self.lengths.sum())

    def frequencies(self, vocab_size: int) -> torch.Tensor:
        """How often each token [V] stands in the sequences, by a sample of at most a million tokens."""
        step = max(1, len(self) * self.sequence_length // 1_000_000)
        with safe_open(self.path, framework="pt") as stored:
            input_ids = stored.get_slice("input_ids")
            counts = torch.zeros(vocab_size, dtype=torch.int64)
            for first in range(0, len(self), 1000 * step):
                counts += torch.bincount(input_ids[first : first + 1000].flatten(), minlength=vocab_size)
        return counts

    def batch(self, start: int, stop: int) -> TokenBatch:
        """The sequences from `start` to `stop`."""
        with safe_open(self.path, framework="pt") as stored:
            input_ids = stored.get_slice("input_ids")[start:stop].long()
        lengths = self.lengths[start:stop].long()
        has_target = torch.arange(self.sequence_length) < lengths[:, None] - 1
        return TokenBatch(input_ids, None, has_target, int(lengths.sum()))


def recipe(config: Config, tokenizer_digest: str) -> Recipe:
    """What decides the content of the sequences."""
    documents = read_manifest(config.path(CORPUS_FOLDER), "corpus", made_by=MADE_BY)
    keys = ("sequence_length", "max_sequences", "max_validation_sequences")
    return Recipe(
        "sequences",
        {"corpus": documents.digest},
        {key: config.corpus.as_dict()[key] for key in keys},
        tokenizer=tokenizer_digest,
    )


def build_sequences(config: Config, tokenizer: Any, tokenizer_digest: str) -> None:
    """Tokenizes and packs the documents, and writes `WORKDIR/sequences/{train,validation}.safetensors`."""
    target = config.path(FOLDER)
    corpus = config.corpus
    with stage("sequences: documents to tokens", reads=[config.path(CORPUS_FOLDER)], writes=target):
        wanted = recipe(config, tokenizer_digest)
        limits = {"train": corpus.max_sequences, "validation": corpus.max_validation_sequences}
        with build_artifact(target, wanted) as building:
            for split in SPLITS:
                tokens, lengths = pack(read_texts(config, split), tokenizer, corpus.sequence_length, limits[split])
                save_file({"input_ids": tokens, "lengths": lengths}, building.folder / f"{split}.safetensors")
                building.facts[split] = {"sequences": len(lengths), "tokens": int(lengths.sum())}
                say(f"  {split}: {len(lengths):,} sequences of {corpus.sequence_length}, {int(lengths.sum()):,} tokens")


def load_sequences(config: Config, split: str, tokenizer_digest: str) -> tuple[Sequences, Manifest]:
    """The packed sequences of a split, and the manifest of `WORKDIR/sequences`.

    Raises:
        UserError: when they are missing, or were tokenized with another tokenizer.
    """
    folder = config.path(FOLDER)
    manifest = read_manifest(folder, "sequences", made_by=MADE_BY)
    require_same(
        "tokenizers",
        expected=tokenizer_digest,
        found=manifest.tokenizer,
        between=f"the teacher and {folder}",
        remedy=f"make the sequences anew with `{MADE_BY}`",
    )
    path = folder / f"{split}.safetensors"
    with safe_open(path, framework="pt") as stored:
        return Sequences(path, stored.get_tensor("lengths"), stored.get_slice("input_ids").get_shape()[1]), manifest


def pack(
    texts: Iterator[str], tokenizer: Any, sequence_length: int, max_sequences: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents, each ended by the tokenizer's end-of-text token, end to end in sequences of equal length.

    The rest that fills no sequence is dropped, unless it is all there is: then it is padded.

    Returns:
        `input_ids` [S, T] int32, and `lengths` [S] int32, the real tokens of each.
    """
    separator = next((i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), None)
    end = [] if separator is None else [separator]
    limit = None if max_sequences is None else max_sequences * sequence_length
    pieces: list[np.ndarray] = []
    size = 0
    with progress_bar(total=limit, label="tokenizing", unit="tokens") as bar:
        for batch in _batched(texts):
            for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
                piece = np.asarray(ids if ids[-1:] == end else [*ids, *end], dtype=np.int32)
                pieces.append(piece)
                size += len(piece)
                bar.update(len(piece))
            if limit is not None and size >= limit:
                break
    stream = np.concatenate(pieces)[:limit] if pieces else np.empty(0, np.int32)
    whole = len(stream) // sequence_length
    if whole:
        tokens = stream[: whole * sequence_length].reshape(whole, sequence_length)
        return torch.from_numpy(tokens.copy()), torch.full((whole,), sequence_length, dtype=torch.int32)
    padding = np.full(sequence_length - len(stream), end[0] if end else 0, np.int32)
    tokens = np.concatenate([stream, padding])[None]
    return torch.from_numpy(tokens), torch.tensor([len(stream)], dtype=torch.int32)


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch
