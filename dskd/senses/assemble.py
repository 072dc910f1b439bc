"""Joins the parts of a sense dictionary, one per rank, into one file: `senses.safetensors`.

A part holds the senses of the tokens that a rank owns: `tokens` [m] and `sizes` [m] int64, `counts` [R] int64 and
`vectors` [R, D] bf16. Parts and dictionary can be larger than memory, so both are written and read through memory maps.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dskd.artifacts.building import Building
from dskd.artifacts.tensor_file import create_tensors, map_tensor
from dskd.console import progress_bar, say
from dskd.errors import UserError
from dskd.lexicon.relations import RELATIONS
from dskd.senses.cluster import TokenSenses
from dskd.senses.csr import offsets_of, ranges
from dskd.senses.dictionary import FILE, tensor_types
from dskd.senses.entries import Entries, describe_dropped_pairs
from dskd.senses.spans import compose_spans, span_sizes

_CHUNK_BYTES = 64 * 2**20  # size of the vectors copied at once


def write_part(
    path: Path, tokens: torch.Tensor, max_sizes: torch.Tensor, hidden_size: int, senses: Iterable[TokenSenses]
) -> None:
    """Writes the senses of `tokens` [m] to a part, batch by batch; `senses` must yield them in the order of `tokens`.

    The file has room for `max_sizes` [m] rows per token. Unused rows stay zero at the end of the file, and nothing
    reads them.
    """
    rows = int(max_sizes.sum())
    shapes = {
        "tokens": ("I64", (len(tokens),)),
        "sizes": ("I64", (len(tokens),)),
        "counts": ("I64", (rows,)),
        "vectors": ("BF16", (rows, hidden_size)),
    }
    with create_tensors(path, shapes) as maps:
        maps["tokens"][:] = tokens.numpy()
        first, token = 0, 0
        for batch in senses:
            stop = first + len(batch.counts)
            maps["sizes"][token : token + len(batch.sizes)] = batch.sizes.numpy()
            token += len(batch.sizes)
            maps["counts"][first:stop] = batch.counts.numpy()
            maps["vectors"][first:stop] = _bits(batch.vectors)
            first = stop
    assert token == len(tokens)


def assemble(
    building: Building, parts: Sequence[Path], entries: Entries, entry_counts: Mapping[str, int], *, k: int
) -> None:
    """Joins the parts in the order of tokens, adds the spans, deletes the parts, and records and prints the counts.

    The counts go to `building.facts`, and so do `entry_counts`, the counts made with the entries. Raises a UserError
    when no token has a sense.
    """
    # The number of senses of each token, from all parts, fixes where its rows go in the whole file.
    maps = [{name: map_tensor(path, name, kind) for name, kind in _PART_TYPES} for path in parts]
    token_sizes = torch.zeros(entries.vocab_size, dtype=torch.int64)
    for part in maps:
        token_sizes[torch.from_numpy(np.array(part["tokens"]))] = torch.from_numpy(np.array(part["sizes"]))
    if not token_sizes.any():
        raise UserError("no token has a state of the teacher, because the training sequences have no targets; add text")
    token_offsets = offsets_of(token_sizes)
    # The spans' rows follow those of all tokens.
    sizes_of_spans = span_sizes(entries.span_tokens, token_offsets, k)
    entry_offsets = offsets_of(torch.cat([token_sizes, sizes_of_spans]))

    hidden_size = maps[0]["vectors"].shape[1]
    with (
        create_tensors(building.folder / FILE, tensor_types(entries, int(entry_offsets[-1]), hidden_size)) as whole,
        progress_bar(total=int(entry_offsets[-1]), label="writing", unit="rows") as bar,
    ):
        whole["entry_offsets"][:] = entry_offsets.numpy()
        for name, tensor in entries.tensors().items():
            whole[name][:] = tensor.numpy()
        # Copy the tokens' rows from each part to their place, in chunks because a part may not fit into memory.
        step = max(1, _CHUNK_BYTES // (2 * hidden_size))
        for part in maps:
            sizes = torch.from_numpy(np.array(part["sizes"]))
            rows = ranges(token_offsets[torch.from_numpy(np.array(part["tokens"]))], sizes).numpy()
            whole["counts"][rows] = part["counts"][: len(rows)]
            for first in range(0, len(rows), step):
                chunk = slice(first, first + step)
                whole["vectors"][rows[chunk]] = part["vectors"][: len(rows)][chunk]
                bar.update(len(rows[chunk]))
        # Compose the spans from the tokens' rows that were just written.
        counts = torch.from_numpy(np.array(whole["counts"]))
        first = int(token_offsets[-1])

        def read_rows(rows: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(whole["vectors"][rows.numpy()]).view(torch.bfloat16).float()

        for vectors, span_counts in compose_spans(entries.span_tokens, read_rows, counts, token_offsets, k):
            stop = first + len(vectors)
            whole["vectors"][first:stop], whole["counts"][first:stop] = _bits(vectors), span_counts.numpy()
            bar.update(stop - first)
            first = stop
    for path in parts:
        path.unlink()
    building.facts.update(
        rows=int(entry_offsets[-1]),
        tokens_with_senses=int((token_sizes > 0).sum()),
        spans_with_senses=int((sizes_of_spans > 0).sum()),
        states=int(counts[: int(token_offsets[-1])].sum()),
        **entry_counts,
        **_relations_with_senses(entries, entry_offsets),
    )
    _report(building.facts, entries.vocab_size)


_PART_TYPES = (("tokens", "I64"), ("sizes", "I64"), ("counts", "I64"), ("vectors", "BF16"))


def _bits(vectors: torch.Tensor) -> np.ndarray:
    """Returns `vectors`, rounded to bf16, as their raw 16 bits."""
    return vectors.to(torch.bfloat16).view(torch.uint16).numpy()


def _relations_with_senses(entries: Entries, entry_offsets: torch.Tensor) -> dict[str, int]:
    """Counts, for each relation, the pairs with senses on both sides; only these can act in training."""
    has_rows = entry_offsets.diff() > 0
    facts = {}
    for relation in RELATIONS:
        neighbours = entries.neighbours(relation)
        usable = has_rows[neighbours.owners] & has_rows[neighbours.values.long()]
        facts[f"{relation}_pairs_with_senses"] = int(usable.sum())
    return facts


def _report(facts: dict[str, Any], vocab_size: int) -> None:
    say(
        f"  {facts['rows']:,} sense embeddings from {facts['states']:,} states: {facts['tokens_with_senses']:,} of "
        f"{vocab_size:,} tokens and {facts['spans_with_senses']:,} of {facts['spans']:,} spans have senses"
    )
    for name in RELATIONS:
        usable, all_pairs = facts[f"{name}_pairs_with_senses"], facts[f"{name}_pairs"]
        heads = facts[f"tokens_with_{name}s"]
        say(f"  {all_pairs:,} {name} pairs of {heads:,} tokens, {usable:,} of them with senses on both sides")
    if reasons := describe_dropped_pairs(facts):
        say(f"  pairs that the tokenizer cannot express: {reasons}")
