"""The sense dictionary's file, `senses/senses.safetensors`, and how to read rows without loading the whole file.

docs/formats.md describes the tensors. R rows, D hidden, V vocabulary, E entries (V tokens, then spans).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest, require_same
from dskd.artifacts.tensor_file import map_tensor
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import open_safetensors
from dskd.senses.csr import sums_of_lists
from dskd.senses.entries import ENTRY_TENSORS, Entries

FILE = "senses.safetensors"
VALUE_BYTES = 2  # vectors and the states that they are made from are bf16
_INDEX_TENSORS = ("counts", "entry_offsets", *ENTRY_TENSORS)


@dataclass(frozen=True)
class SenseDictionary:
    """A sense dictionary without its vectors, which stay on disk and are read row by row."""

    path: Path
    vocab_size: int
    hidden_size: int
    counts: torch.Tensor  # [R] int64, number of states that each row represents
    entry_offsets: torch.Tensor  # [E+1] int64; rows_of(e) is entry_offsets[e]:entry_offsets[e+1]
    entries: Entries

    @property
    def num_rows(self) -> int:
        """The number of rows, R."""
        return len(self.counts)

    @functools.cached_property
    def mapped(self) -> np.ndarray:
        """The vectors as :func:`map_vectors` returns them."""
        return map_vectors(self.path)

    def read(self, rows: range) -> torch.Tensor:
        """Reads the vectors [n, D] bf16 of consecutive rows."""
        return torch.from_numpy(np.array(self.mapped[rows.start : rows.stop])).view(torch.bfloat16)

    def rows_of(self, entry: int, stop: int | None = None) -> range:
        """Returns the rows of an entry; with `stop`, of all entries from `entry` up to, not including, `stop`."""
        end = entry + 1 if stop is None else stop
        return range(int(self.entry_offsets[entry]), int(self.entry_offsets[end]))

    def rows_of_tokens(self, tokens: Sequence[int]) -> range:
        """Returns the rows of the entry with these tokens; empty if there is no such entry, or if it has no sense."""
        entry = self.entries.find(tokens)
        return range(0) if entry is None else self.rows_of(entry)

    @property
    def senses_per_entry(self) -> torch.Tensor:
        """The number of rows [E] of each entry."""
        return self.entry_offsets.diff()

    @property
    def senses_per_token(self) -> torch.Tensor:
        """The number of rows [V] of each token."""
        return self.senses_per_entry[: self.vocab_size]

    @property
    def states_per_token(self) -> torch.Tensor:
        """The number of states [V] that the rows of each token represent."""
        return sums_of_lists(self.counts, self.entry_offsets[: self.vocab_size + 1])


def tensor_types(entries: Entries, rows: int, hidden_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns {tensor's name: (type in safetensors' notation, shape)} for a dictionary with `rows` rows."""
    types: dict[str, tuple[str, tuple[int, ...]]] = {
        "vectors": ("BF16", (rows, hidden_size)),
        "counts": ("I64", (rows,)),
        "entry_offsets": ("I64", (entries.num_entries + 1,)),
    }
    for name, tensor in entries.tensors().items():
        types[name] = ("I64" if tensor.dtype == torch.int64 else "I32", tuple(tensor.shape))
    return types


def dictionary_folder(config: Config) -> Path:
    """Returns `senses.path` if it is set, otherwise `WORKDIR/senses`."""
    return Path(config.senses.path).expanduser() if config.senses.path is not None else config.path(kinds.SENSES.folder)


def load_dictionary(config: Config) -> tuple[SenseDictionary, Manifest]:
    """Returns the experiment's dictionary and its manifest. Raises a UserError when it is missing, damaged or lacks a
    tensor.
    """
    folder = dictionary_folder(config)
    made_by = kinds.SENSES.made_by if config.senses.path is None else "dskd senses merge …, or remove senses.path"
    manifest = read_manifest(folder, kinds.SENSES.name, made_by=made_by)
    return read_dictionary(folder / FILE), manifest


def load_fitting_dictionary(config: Config, teacher: ModelFolder) -> tuple[SenseDictionary, Manifest]:
    """Returns what :func:`load_dictionary` returns, with the same errors, and with a UserError if the dictionary was
    built with another teacher.
    """
    dictionary, manifest = load_dictionary(config)
    require_fitting(dictionary, manifest, teacher, teacher.load_config().hidden_size)
    return dictionary, manifest


def read_dictionary(path: Path) -> SenseDictionary:
    """Reads a dictionary's file. Raises a UserError when it is damaged, lacks a tensor, or its tensors do not fit each
    other.
    """
    with open_safetensors(path) as stored:
        names = set(stored.keys())
        missing = {"vectors", *_INDEX_TENSORS} - names
        if missing:
            raise UserError(f"{path}: this is not a sense dictionary, because it lacks {', '.join(sorted(missing))}")
        tensors = {name: stored.get_tensor(name) for name in _INDEX_TENSORS}
        shape = stored.get_slice("vectors").get_shape()
    vocab_size = len(tensors["synonym_offsets"]) - 1
    entries = Entries(vocab_size, **{name: tensors[name] for name in ENTRY_TENSORS})
    offsets = tensors["entry_offsets"]
    if len(offsets) != entries.num_entries + 1 or int(offsets[-1]) != shape[0] or len(tensors["counts"]) != shape[0]:
        raise UserError(
            f"{path}: the tensors do not fit each other ({shape[0]} vectors, {len(tensors['counts'])} counts, "
            f"{len(offsets) - 1} entries that end at row {int(offsets[-1])}); make it again with "
            f"`{kinds.SENSES.made_by}`"
        )
    return SenseDictionary(path, entries.vocab_size, shape[1], tensors["counts"], offsets, entries)


def require_fitting(dictionary: SenseDictionary, manifest: Manifest, teacher: ModelFolder, hidden_size: int) -> None:
    """Raises a UserError, which names both sides, if the dictionary has another hidden size, tokenizer or teacher."""
    remedy = f"make the dictionary again with `{kinds.SENSES.made_by}`"
    if dictionary.hidden_size != hidden_size:
        raise UserError(
            f"{dictionary.path}: its sense embeddings have {dictionary.hidden_size} dimensions, but the model's hidden "
            f"states have {hidden_size}; {remedy}"
        )
    between = f"{dictionary.path.parent} and the teacher"
    for what, expected, actual in (
        ("tokenizers", teacher.tokenizer_digest, manifest.tokenizer),
        ("teachers", teacher.digest, manifest.teacher),
    ):
        require_same(what, expected=expected, actual=actual, between=between, remedy=remedy)


def map_vectors(path: Path) -> np.ndarray:
    """Maps `vectors` [R, D] into memory, read-only, as the raw 16 bits of each bf16.

    A page is read from disk only when one of its rows is used. This is for the loader's workers, which read a few
    thousand rows per batch from a file that may have tens of gigabytes.
    """
    return map_tensor(path, "vectors", "BF16")
