"""Turns documents into the token sequences that every later stage reads: `WORKDIR/sequences`.

The teacher's tokenizer tokenizes the documents, and `corpus.packing` decides how they are packed into sequences of
`corpus.sequence_length`. Only the evaluation reads the held-out part.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Manifest, Recipe, read_manifest, require_same
from dskd.artifacts.tensor_file import map_tensor, tensor_names
from dskd.config import Config
from dskd.console import say, stage, warn
from dskd.corpus.build import (
    SPLITS,
    lengths_of_chats,
    name_of_document,
    read_continuation_tokens,
    read_texts,
    read_tokens,
)
from dskd.corpus.chats.packing import Tokens, pack_chats
from dskd.corpus.packing import Packed, pack
from dskd.errors import UserError
from dskd.models.tokenizing import require_known, text_end


@dataclass(frozen=True)
class TokenBatch:
    """A batch of sequences in the form that the models read: B sequences of T tokens."""

    input_ids: torch.Tensor  # [B, T] int64
    position_ids: torch.Tensor | None  # [B, T] int64, from 0 in each document; None if no document starts inside
    has_target: torch.Tensor  # [B, T] bool, True if x_{i+1} continues the document of x_i, and counts in the loss
    starts: torch.Tensor  # [B, T] uint8, 1 where attention and positions start again
    num_tokens: int  # without padding
    continuation_tokens: torch.Tensor | None = None  # [B] int64, how many the teacher may add; None: any number

    def without_targets(self) -> "TokenBatch":
        """Returns the same tokens without targets, for a rank that has no work left but must join a forward pass."""
        return replace(self, has_target=torch.zeros_like(self.has_target), num_tokens=0)


@dataclass(frozen=True)
class Sequences:
    """The packed token sequences on disk: S sequences of T tokens, read in slices through a memory map.

    `lengths` [S] is the number of real tokens of each sequence; the rest is padding, which no loss uses.
    `continuation_tokens` [S] is the number of tokens by which the teacher may continue each. `has_prompts` is True if
    some tokens do not count in the loss, as in chats.
    """

    path: Path
    lengths: np.ndarray
    sequence_length: int
    continuation_tokens: np.ndarray | None = None
    has_prompts: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """The number of real tokens in all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def frequencies(self, vocab_size: int) -> torch.Tensor:
        """Counts how often each token [V] is a target, in a sample of about a million positions."""
        # 64 batches of about 16,384 positions each, spread evenly over the sequences.
        size = max(1, 16_384 // self.sequence_length)
        starts = np.unique(np.linspace(0, max(0, len(self) - size), 64).astype(np.int64) // size * size)
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for start in starts.tolist():
            batch = self.batch(start, start + size)
            targets = batch.input_ids.roll(-1, dims=1)[batch.has_target]
            counts += torch.bincount(targets, minlength=vocab_size)
        return counts

    def batch(self, start: int, stop: int) -> TokenBatch:
        """Returns the sequences from `start` up to, not including, `stop`."""
        return self.select(slice(start, stop))

    def select(self, rows: slice | np.ndarray) -> TokenBatch:
        """Returns the sequences of a slice, or those with the given numbers."""
        input_ids = torch.from_numpy(map_tensor(self.path, "input_ids", "I32")[rows].astype(np.int64))
        starts = torch.from_numpy(np.array(map_tensor(self.path, "starts", "U8")[rows]))
        lengths = torch.from_numpy(self.lengths[rows].astype(np.int64))
        # A position has a target if the next one is a real token and does not start a document.
        has_target = torch.arange(self.sequence_length) < lengths[:, None] - 1
        has_target[:, :-1] &= starts[:, 1:] == 0
        if self.has_prompts:
            counted = torch.from_numpy(np.array(map_tensor(self.path, "counted", "U8")[rows]))
            has_target[:, :-1] &= counted[:, 1:] == 1
        continuation = None if self.continuation_tokens is None else self.continuation_tokens[rows].astype(np.int64)
        return TokenBatch(
            input_ids,
            position_ids_of(starts),
            has_target,
            starts,
            int(lengths.sum()),
            None if continuation is None else torch.from_numpy(continuation),
        )


def open_sequences(path: Path) -> Sequences:
    """Opens the sequences in a file that :func:`dskd.corpus.packing.pack` or
    :func:`dskd.corpus.chats.packing.pack_chats` wrote.
    """
    sequence_length = map_tensor(path, "input_ids", "I32").shape[1]
    lengths = np.array(map_tensor(path, "lengths", "I32"))
    names = tensor_names(path)
    limits = np.array(map_tensor(path, "continuation_tokens", "I32")) if "continuation_tokens" in names else None
    return Sequences(path, lengths, sequence_length, limits, has_prompts="counted" in names)


def position_ids_of(starts: torch.Tensor) -> torch.Tensor | None:
    """Returns positions [B, T] int64 that count from each start in `starts` [B, T], or None if all starts are at 0.

    Without position ids, models take their fast path, in which a position sees every earlier one in its sequence.
    """
    if not starts[:, 1:].any():
        return None
    index = torch.arange(starts.shape[1])
    return index - (index * starts).cummax(dim=1).values


def recipe(config: Config, tokenizer_digest: str) -> Recipe:
    """Returns the recipe of the sequences: every input and setting that affects their content."""
    documents = read_manifest(config.path(kinds.CORPUS.folder), kinds.CORPUS.name)
    keys = ["sequence_length", "packing", "max_sequences", "max_validation_sequences"]
    if config.corpus.source == "chat":
        keys.append("long_chats")
    return Recipe(
        kinds.SEQUENCES.name,
        {"corpus": documents.digest},
        {key: config.corpus.as_dict()[key] for key in keys},
        tokenizer=tokenizer_digest,
    )


def build_sequences(config: Config, tokenizer: Any, tokenizer_digest: str, vocab_size: int | None = None) -> None:
    """Tokenizes and packs the documents, and writes `WORKDIR/sequences/{train,validation}.safetensors`. Raises the
    errors of :func:`dskd.corpus.packing.pack`.
    """
    target = config.path(kinds.SEQUENCES.folder)
    corpus = config.corpus
    with stage("sequences: documents to tokens", reads=[config.path(kinds.CORPUS.folder)], writes=target):
        is_text = corpus.source != "chat"  # the chat template ends chats
        if is_text and text_end(tokenizer) is None and not tokenizer("", verbose=False)["input_ids"]:
            warn(
                "the tokenizer has neither an end-of-text token nor a beginning-of-text token, so no token ends a "
                "document, and the student does not learn to end one; if the teacher has such a token, name it in "
                "tokenizer_config.json (eos_token)"
            )
        with build_artifact(target, recipe(config, tokenizer_digest)) as building:
            pack_split = _pack_chats if corpus.source == "chat" else _pack_texts
            for split in SPLITS:
                packed = pack_split(config, split, building.folder / _file(split), tokenizer, vocab_size)
                building.facts[split] = {
                    name: number for name, number in packed._asdict().items() if number is not None
                }
                rest = (
                    f"{packed.left_over:,} at the end fill none and are left out"
                    if packed.counted is None
                    else f"{packed.counted:,} of them count in the loss"
                )
                say(
                    f"  {split}: {packed.sequences:,} sequences of {corpus.sequence_length}, {packed.tokens:,} tokens; "
                    f"{rest}"
                )


def _pack_texts(config: Config, split: str, path: Path, tokenizer: Any, vocab_size: int | None) -> Packed:
    return pack(
        read_texts(config, split),
        tokenizer,
        path,
        sequence_length=config.corpus.sequence_length,
        packing=config.corpus.packing,
        max_sequences=_limit(config, split),
        continuation_tokens=read_continuation_tokens(config, split),
        vocab_size=vocab_size,
        name_of=functools.partial(name_of_document, config, split),
    )


def _pack_chats(config: Config, split: str, path: Path, tokenizer: Any, vocab_size: int | None) -> Packed:
    return pack_chats(
        _chats_that_fit(config, split, tokenizer, vocab_size),
        path,
        sequence_length=config.corpus.sequence_length,
        packing=config.corpus.packing,
        padding=text_end(tokenizer) or 0,
        max_sequences=_limit(config, split),
    )


def _chats_that_fit(config: Config, split: str, tokenizer: Any, vocab_size: int | None) -> Iterator[Tokens]:
    """Yields the tokens of chats that are not longer than a sequence.

    Raises:
        UserError: when a chat is longer and `corpus.long_chats` is `refuse`, when all are, or when a chat has a token
            that is not below `vocab_size`.
    """
    corpus, lengths = config.corpus, lengths_of_chats(config, split)
    fits = lengths <= corpus.sequence_length
    if not fits.all():
        long = (
            f"{name_of_document(config, split, int(np.argmin(fits)))}: this chat has {lengths[np.argmin(fits)]:,} "
            f"tokens, more than corpus.sequence_length, {corpus.sequence_length:,}, and so have {(~fits).sum() - 1:,} "
            f"more of the {len(lengths):,} {split} chats; the longest has {lengths.max():,}"
        )
        if corpus.long_chats == "refuse" or not fits.any():
            also = ", or set corpus.long_chats: drop to leave them out" if fits.any() else ""
            raise UserError(f"{long}. Raise corpus.sequence_length{also}")
        warn(f"{long}. They are left out")
    for number, (chat, is_short) in enumerate(zip(read_tokens(config, split), fits, strict=True)):
        if is_short:
            if vocab_size is not None and len(chat[0]) and int(chat[0].max()) >= vocab_size:
                name = name_of_document(config, split, number)
                require_known([int(chat[0].max())], vocab_size, tokenizer, name)
            yield chat


def _limit(config: Config, split: str) -> int | None:
    return config.corpus.max_sequences if split == "train" else config.corpus.max_validation_sequences


def load_sequences(config: Config, split: str, tokenizer_digest: str) -> tuple[Sequences, Manifest]:
    """Returns the packed sequences of a split, and the manifest of `WORKDIR/sequences`. Raises a UserError when they
    are missing, or were tokenized with another tokenizer.
    """
    folder = config.path(kinds.SEQUENCES.folder)
    manifest = read_manifest(folder, kinds.SEQUENCES.name)
    require_same(
        "tokenizers",
        expected=tokenizer_digest,
        actual=manifest.tokenizer,
        between=f"the teacher and {folder}",
        remedy=f"make the sequences again with `{kinds.SEQUENCES.made_by}`",
    )
    return open_sequences(folder / _file(split)), manifest


def _file(split: str) -> str:
    return f"{split}.safetensors"
