"""Documents to sequences of equal length, in one of three ways (`corpus.packing`).

| packing | a sequence holds | attention and positions start again |
|---|---|---|
| documents | documents end to end; one that is cut goes on in the next sequence | at each document, and each sequence |
| stream | the same | at each sequence |
| none | one document, or a part of a long one, padded | at each sequence |

Tokens go through a temporary file: memory does not grow with the corpus. Shapes: S sequences, T tokens.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dskd.artifacts.tensor_file import create_tensors
from dskd.console import progress_bar
from dskd.corpus.build import BATCH_DOCUMENTS
from dskd.models.tokenizing import Tokenizing

_BATCH_CHARACTERS = 4_000_000
_COPIED_TOKENS = 4_000_000


class Packed(NamedTuple):
    """How much there is."""

    sequences: int
    tokens: int  # real ones
    left_over: int  # at the end of the text, filling no sequence


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
    """Tokenizes documents, each ended by the tokenizer's end-of-text token, and writes them as sequences.

    End to end, the rest that fills no sequence is dropped, unless it is all there is: then it is padded.

    Args:
        texts: the documents.
        tokenizer: the teacher's.
        path: the safetensors file to write: `input_ids` [S, T] int32; `starts` [S, T] uint8, 1 where attention and
            positions start again; `lengths` [S] int32, the real tokens of each sequence.
        sequence_length: T.
        packing: as in the table above.
        max_sequences: stop after so many.
        continuation_tokens: with packing: none. A number of each document, kept as a tensor [S] int32.
        vocab_size: tokens from this on are refused.
        name_of: the name of a document by its number from 0, for messages.

    Raises:
        UserError: for a token that the model does not have.
    """
    tokenizing = Tokenizing(tokenizer, vocab_size)
    padding = tokenizing.end[0] if tokenizing.end else 0
    limit = None if max_sequences is None else max_sequences * sequence_length
    spooled = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent))
        names = ("input_ids", "starts", "lengths", "continuation_tokens")
        spool = {name: stack.enter_context(Path(folder, name).open("w+b")) for name in names}
        with progress_bar(total=limit, label="tokenizing", unit="tokens") as bar:
            first = 0  # the number of the batch's first document
            for batch in _batched(texts):
                before = bar.n
                documents = tokenizing.read(
                    batch,
                    bar.update,
                    _counted_from(first, name_of),
                    None if limit is None else limit - spooled,
                )
                first += len(batch)
                sizes = np.array([len(tokens) for tokens in documents if len(tokens)], np.int64)
                tokens = np.concatenate(documents)
                if packing == "none":
                    tokens, lengths = _own_rows(tokens, sizes, sequence_length, padding)
                    lengths.tofile(spool["lengths"])
                    if continuation_tokens is not None:
                        numbers = np.fromiter(itertools.islice(continuation_tokens, len(batch)), np.int32, len(batch))
                        numbers.repeat(-(-sizes // sequence_length)).tofile(spool["continuation_tokens"])
                elif packing == "documents":
                    _starts_of(sizes).tofile(spool["starts"])
                tokens.tofile(spool["input_ids"])
                spooled += len(tokens)
                bar.update(len(tokens) - (bar.n - before))  # the padding
                if limit is not None and spooled >= limit:
                    break
        return _write(path, spool, spooled if limit is None else min(spooled, limit), sequence_length, padding)


def _counted_from(first: int, name_of: Callable[[int], str]) -> Callable[[int], str]:
    return lambda number: name_of(first + number)


def _starts_of(sizes: np.ndarray) -> np.ndarray:
    """1 at the first token of each document, for documents of these sizes end to end; uint8."""
    starts = np.zeros(sizes.sum(), np.uint8)
    starts[sizes.cumsum() - sizes] = 1
    return starts


def _own_rows(
    tokens: np.ndarray, sizes: np.ndarray, sequence_length: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each document in rows of its own, padded: tokens [rows · T] int32, and the real ones of each row int32."""
    rows = -(-sizes // sequence_length)
    first_row = rows.cumsum() - rows
    before = sizes.cumsum() - sizes
    # The rows of a document lie end to end, so all of its tokens move by the same distance.
    places = np.arange(len(tokens)) + (first_row * sequence_length - before).repeat(sizes)
    padded = np.full(rows.sum() * sequence_length, padding, np.int32)
    padded[places] = tokens
    lengths = np.full(rows.sum(), sequence_length, np.int32)
    lengths[first_row + rows - 1] = sizes - (rows - 1) * sequence_length
    return padded, lengths


def _write(path: Path, spool: Mapping[str, BinaryIO], spooled: int, sequence_length: int, padding: int) -> Packed:
    """Copies the spooled tokens into the file they are read from, piece by piece."""
    whole = spooled // sequence_length
    size = max(1, whole)
    sizes = {name: stream.tell() for name, stream in spool.items()}
    for stream in spool.values():
        stream.seek(0)
    shape = (size, sequence_length)
    layout = {"input_ids": ("I32", shape), "starts": ("U8", shape), "lengths": ("I32", (size,))}
    if sizes["continuation_tokens"]:
        layout["continuation_tokens"] = ("I32", (size,))
    with create_tensors(path, layout) as tensors:
        if not whole:
            tensors["input_ids"][0] = padding
        for name in ("input_ids", "starts"):
            flat = tensors[name].reshape(-1)
            wanted = min(spooled, len(flat)) if sizes[name] else 0
            for first in range(0, wanted, _COPIED_TOKENS):
                count = min(_COPIED_TOKENS, wanted - first)
                flat[first : first + count] = np.fromfile(spool[name], flat.dtype, count)
        tensors["starts"][:, 0] = 1
        if sizes["lengths"]:
            tensors["lengths"][:] = np.fromfile(spool["lengths"], np.int32, size)
        else:
            tensors["lengths"][:] = sequence_length if whole else spooled
        if sizes["continuation_tokens"]:
            tensors["continuation_tokens"][:] = np.fromfile(spool["continuation_tokens"], np.int32, size)
        tokens = int(tensors["lengths"].sum(dtype=np.int64))
        return Packed(size, tokens, spooled - whole * sequence_length if whole else 0)


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    """Batches for the tokenizer, which needs some hundred bytes a token: books are not to come a thousand at a time."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
