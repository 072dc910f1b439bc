"""Packs documents into sequences of equal length, in one of three ways (`corpus.packing`).

| packing | a sequence holds | attention and positions start again |
|---|---|---|
| documents | concatenated documents; a cut one continues in the next sequence | at each document and each sequence |
| stream | the same | at each sequence |
| none | one document, or a part of a long one, padded | at each sequence |

Tokens go through a temporary file, so memory does not grow with the corpus. Shapes: S sequences, T tokens.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dskd.artifacts.tensor_file import create_tensors
from dskd.console import progress_bar
from dskd.models.tokenizing import Tokenizing

_BATCH_DOCUMENTS = 1000  # tokenized at one time, or fewer with as many characters
_BATCH_CHARACTERS = 4_000_000
_COPIED_TOKENS = 4_000_000


class Packed(NamedTuple):
    """The numbers of packed sequences and tokens."""

    sequences: int
    tokens: int  # without padding
    left_over: int  # tokens dropped at the end of the text, because they do not fill a sequence
    counted: int | None = None  # tokens that count in the loss as targets, of chats; None: all


def pack(
    texts: Iterator[str],
    tokenizer: Any,
    path: Path,
    *,
    sequence_length: int,
    packing: str,
    max_sequences: int | None = None,
    continuation_tokens: Iterator[int] | None = None,
    vocab_size: int | None = None,
    name_of: Callable[[int], str] = "document {}".format,
) -> Packed:
    """Tokenizes documents, adds the tokenizer's end-of-text token to each, and writes them as sequences.

    When documents are concatenated, the last tokens, which do not fill a sequence, are dropped. If they are all there
    is, they are padded to one sequence instead.

    `path` is the safetensors file to write: `input_ids` [S, T] int32; `starts` [S, T] uint8, 1 where attention and
    positions start again; `lengths` [S] int32, the number of real tokens in each sequence; and `continuation_tokens`
    [S] int32, from one number per document, only with packing: none. `packing` is one of the three ways in the module's
    table.

    Raises:
        UserError: when a document has a token that is not below `vocab_size`, the number of the model's tokens.
            `name_of` returns the document's name by its number, counted from 0.
    """
    tokenizing = Tokenizing(tokenizer, vocab_size)
    padding = tokenizing.end[0] if tokenizing.end else 0
    limit = None if max_sequences is None else max_sequences * sequence_length
    # Spool each tensor to a file of its own: the number of sequences is known only after the last document.
    spooled = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent))
        names = ("input_ids", "starts", "lengths", "continuation_tokens")
        spool = {name: stack.enter_context(Path(folder, name).open("w+b")) for name in names}
        with progress_bar(total=limit, label="tokenizing", unit="tokens") as bar:
            first = 0  # the number of the batch's first document
            for batch in batched(texts):
                before = bar.n
                documents = tokenizing.read(
                    batch,
                    bar.update,
                    lambda number, first=first: name_of(first + number),  # type: ignore[misc]
                    None if limit is None else limit - spooled,
                )
                first += len(batch)
                # One array of all tokens, padded for packing: none, and the number of tokens of each document.
                sizes = np.array([len(tokens) for tokens in documents if len(tokens)], np.int64)
                tokens = np.concatenate(documents)
                if packing == "none":
                    tokens, lengths = _own_rows(tokens, sizes, sequence_length, padding)
                    lengths.tofile(spool["lengths"])
                    if continuation_tokens is not None:
                        numbers = np.fromiter(itertools.islice(continuation_tokens, len(batch)), np.int32, len(batch))
                        numbers.repeat(-(-sizes // sequence_length)).tofile(spool["continuation_tokens"])
                elif packing == "documents":
                    starts = np.zeros(len(tokens), np.uint8)
                    starts[sizes.cumsum() - sizes] = 1
                    starts.tofile(spool["starts"])
                tokens.tofile(spool["input_ids"])
                spooled += len(tokens)
                bar.update(len(tokens) - (bar.n - before))  # count the padding too
                if limit is not None and spooled >= limit:
                    break
        return write_sequences(path, spool, spooled if limit is None else min(spooled, limit), sequence_length, padding)


def _own_rows(
    tokens: np.ndarray, sizes: np.ndarray, sequence_length: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts each document into rows of its own, padded. Returns the tokens [rows · T] int32, and the number of real
    tokens [rows] int32 in each row.
    """
    rows = -(-sizes // sequence_length)
    first_row = rows.cumsum() - rows
    before = sizes.cumsum() - sizes
    # The rows of a document are contiguous, so all of its tokens move by the same distance.
    places = np.arange(len(tokens)) + (first_row * sequence_length - before).repeat(sizes)
    padded = np.full(rows.sum() * sequence_length, padding, np.int32)
    padded[places] = tokens
    lengths = np.full(rows.sum(), sequence_length, np.int32)
    lengths[first_row + rows - 1] = sizes - (rows - 1) * sequence_length
    return padded, lengths


def write_sequences(
    path: Path, spool: Mapping[str, BinaryIO], spooled: int, sequence_length: int, padding: int
) -> Packed:
    """Copies tensors, chunk by chunk, into the safetensors file `path` that :func:`pack` describes.

    `spool` has a file of raw values for each tensor: of `spooled` tokens, or of their sequences. It may also have
    `counted`, uint8, which becomes [S, T].
    """
    whole = spooled // sequence_length
    size = max(1, whole)
    sizes = {name: stream.tell() for name, stream in spool.items()}
    for stream in spool.values():
        stream.seek(0)
    shape = (size, sequence_length)
    layout = {"input_ids": ("I32", shape), "starts": ("U8", shape), "lengths": ("I32", (size,))}
    if sizes.get("continuation_tokens"):
        layout["continuation_tokens"] = ("I32", (size,))
    if "counted" in sizes:
        layout["counted"] = ("U8", shape)
    # If there is not even one whole sequence, the rest of the only one stays padding.
    with create_tensors(path, layout) as tensors:
        if not whole:
            tensors["input_ids"][0] = padding
        for name in ("input_ids", "starts", *(["counted"] if "counted" in layout else [])):
            flat = tensors[name].reshape(-1)
            copied = min(spooled, len(flat)) if sizes[name] else 0
            for first in range(0, copied, _COPIED_TOKENS):
                count = min(_COPIED_TOKENS, copied - first)
                flat[first : first + count] = np.fromfile(spool[name], flat.dtype, count)
        # Every sequence starts anew; its length is given by packing: none, and is the full length otherwise.
        tensors["starts"][:, 0] = 1
        if sizes["lengths"]:
            tensors["lengths"][:] = np.fromfile(spool["lengths"], np.int32, size)
        else:
            tensors["lengths"][:] = sequence_length if whole else spooled
        if "continuation_tokens" in layout:
            tensors["continuation_tokens"][:] = np.fromfile(spool["continuation_tokens"], np.int32, size)
        tokens = int(tensors["lengths"].sum(dtype=np.int64))
        return Packed(size, tokens, spooled - whole * sequence_length if whole else 0)


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields batches of texts, limited in number and in characters.

    The tokenizer needs some hundred bytes per token, so a thousand books at once would need too much memory.
    """
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
