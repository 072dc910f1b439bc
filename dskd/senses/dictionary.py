"""The sense dictionary's file, `senses/senses.safetensors`, and reading rows of it without loading it.

docs/formats.md describes the tensors. R rows, D hidden, V vocabulary, E entries (V tokens, then spans).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dskd.artifacts import kinds
from dskd.artifacts.files import full_disk_is_said
from dskd.artifacts.manifest import Manifest, read_manifest, require_same
from dskd.artifacts.tensor_file import map_tensor
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.folder import ModelFolder
from dskd.models.weights import open_safetensors
from dskd.senses.entries import Entries, entry_of_tokens

FILE = "senses.safetensors"
_INDEX_TENSORS = (
    "counts",
    "entry_offsets",
    "span_tokens",
    "synonym_offsets",
    "synonym_entries",
    "antonym_offsets",
    "antonym_entries",
)


@dataclass(frozen=True)
class SenseDictionary:
    """Everything of the dictionary but its vectors, which stay on disk and are read by row."""

    path: Path
    vocab_size: int
    hidden_size: int
    counts: torch.Tensor  # [R] int64, states behind each row
    entry_offsets: torch.Tensor  # [E+1] int64; rows of entry e are entry_offsets[e]:entry_offsets[e+1]
    entries: Entries

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.counts)

    def vectors(self) -> torch.Tensor:
        """All vectors [R, D] bf16. For the annotation, which reads every row again and again."""
        return open_safetensors(self.path).get_tensor("vectors")


def tensor_types(entries: Entries, rows: int, hidden_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (type as safetensors calls it, shape)} of a dictionary with so many rows."""
    types: dict[str, tuple[str, tuple[int, ...]]] = {
        "vectors": ("BF16", (rows, hidden_size)),
        "counts": ("I64", (rows,)),
        "entry_offsets": ("I64", (entries.num_entries + 1,)),
    }
    for name, tensor in entries.tensors().items():
        types[name] = ("I64" if tensor.dtype == torch.int64 else "I32", tuple(tensor.shape))
    return types


def save_dictionary(
    path: Path, vectors: torch.Tensor, counts: torch.Tensor, entry_offsets: torch.Tensor, entries: Entries
) -> None:
    """Writes the file; `vectors` [R, D] bf16, `counts` [R], `entry_offsets` [E+1]."""
    tensors = {"vectors": vectors.to(torch.bfloat16), "counts": counts, "entry_offsets": entry_offsets}
    tensors |= entries.tensors()
    with full_disk_is_said(path.parent):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def dictionary_folder(config: Config) -> Path:
    """`senses.path` where it is given, `WORKDIR/senses` otherwise."""
    return Path(config.senses.path).expanduser() if config.senses.path is not None else config.path(kinds.SENSES.folder)


def load_dictionary(config: Config) -> tuple[SenseDictionary, Manifest]:
    """The dictionary of the experiment, and its manifest.

    Raises:
        UserError: when it is missing, damaged or lacks a tensor.
    """
    folder = dictionary_folder(config)
    made_by = kinds.SENSES.made_by if config.senses.path is None else "dskd senses merge …, or remove senses.path"
    manifest = read_manifest(folder, "senses", made_by=made_by)
    return read_dictionary(folder / FILE), manifest


def load_fitting_dictionary(config: Config, teacher: ModelFolder) -> tuple[SenseDictionary, Manifest]:
    """:func:`load_dictionary`, for use with this teacher.

    Raises:
        UserError: also when it was made for another one.
    """
    dictionary, manifest = load_dictionary(config)
    require_fitting(
        dictionary,
        manifest,
        teacher=teacher.digest,
        tokenizer=teacher.tokenizer_digest,
        hidden_size=teacher.load_config().hidden_size,
    )
    return dictionary, manifest


def read_dictionary(path: Path) -> SenseDictionary:
    """The dictionary in one file.

    Raises:
        UserError: when it is damaged, lacks a tensor, or its parts do not fit each other.
    """
    with open_safetensors(path) as stored:
        names = set(stored.keys())
        missing = {"vectors", *_INDEX_TENSORS} - names
        if missing:
            raise UserError(f"{path}: not a sense dictionary: it lacks {', '.join(sorted(missing))}")
        tensors = {name: stored.get_tensor(name) for name in _INDEX_TENSORS}
        shape = stored.get_slice("vectors").get_shape()
    entries = Entries(
        vocab_size=len(tensors["synonym_offsets"]) - 1, **{name: tensors[name] for name in _INDEX_TENSORS[2:]}
    )
    offsets = tensors["entry_offsets"]
    if len(offsets) != entries.num_entries + 1 or int(offsets[-1]) != shape[0] or len(tensors["counts"]) != shape[0]:
        raise UserError(
            f"{path}: the tensors do not fit each other ({shape[0]} vectors, {len(tensors['counts'])} counts, "
            f"{len(offsets) - 1} entries that end at row {int(offsets[-1])}); make it again with "
            f"`{kinds.SENSES.made_by}`"
        )
    return SenseDictionary(path, entries.vocab_size, shape[1], tensors["counts"], offsets, entries)


def require_fitting(
    dictionary: SenseDictionary, manifest: Manifest, *, teacher: str, tokenizer: str, hidden_size: int
) -> None:
    """Refuses a dictionary that was made for another teacher.

    Raises:
        UserError: naming both sides.
    """
    remedy = f"make the dictionary again with `{kinds.SENSES.made_by}`"
    if dictionary.hidden_size != hidden_size:
        raise UserError(
            f"{dictionary.path}: its sense embeddings have {dictionary.hidden_size} dimensions, the model's hidden "
            f"states {hidden_size}; {remedy}"
        )
    between = f"{dictionary.path.parent} and the teacher"
    require_same("tokenizers", expected=tokenizer, found=manifest.tokenizer, between=between, remedy=remedy)
    require_same("teachers", expected=teacher, found=manifest.teacher, between=between, remedy=remedy)


def map_vectors(path: Path) -> np.ndarray:
    """`vectors` [R, D] as a read-only memory map of the raw 16 bits of each bf16; pages are read when rows are.

    The loader's workers use it: they touch a few thousand rows a batch of a file that may have tens of gigabytes.
    """
    return map_tensor(path, "vectors", "BF16")


def rows_of_entry(dictionary: SenseDictionary, entry: int) -> range:
    """The rows of an entry."""
    return range(int(dictionary.entry_offsets[entry]), int(dictionary.entry_offsets[entry + 1]))


def rows_of_tokens(dictionary: SenseDictionary, tokens: Sequence[int]) -> range:
    """The rows of the entry with these tokens; empty where there is no such entry, or it has no sense."""
    entry = entry_of_tokens(dictionary.entries, tokens)
    return range(0) if entry is None else rows_of_entry(dictionary, entry)
