"""Senses of spans of two and three tokens, composed of their tokens' senses (docs/method.md, section 2)."""

from collections.abc import Callable, Iterator

import torch

_ELEMENTS = 8_000_000  # floats of the rows of the spans that are composed at one time


def span_sizes(span_tokens: torch.Tensor, offsets: torch.Tensor, k: int) -> torch.Tensor:
    """How many senses each span [S, 3] has: as many as its first token, up to k, and none where a token has none.

    Args:
        span_tokens: [S, 3], padded with -1.
        offsets: [V+1], rows of token v are offsets[v]:offsets[v+1].
        k: senses a token has at most.
    """
    sizes = offsets.diff()[span_tokens.long().clamp(min=0)]
    complete = ((sizes > 0) | (span_tokens < 0)).all(-1)
    return torch.where(complete, sizes[:, 0].clamp(max=k), 0)


def compose_spans(
    span_tokens: torch.Tensor,
    read_rows: Callable[[torch.Tensor], torch.Tensor],
    counts: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One sense per sense of the first token: each further token adds the sense nearest to the mean of the rows so far.

    Args:
        span_tokens: [S, 3], padded with -1.
        read_rows: the senses of the tokens, float32 [..., D], for row numbers [...].
        counts: [R], states behind each row.
        offsets: [V+1], rows of token v are offsets[v]:offsets[v+1].
        k: senses a token has at most.

    Yields:
        Vectors [r, D] float32, and states behind each [r] (those of all its parts), of some spans at a time; together
        those of all spans in their order, as many as :func:`span_sizes` says.
    """
    chunk = max(1, _ELEMENTS // (k * read_rows(torch.zeros(1, dtype=torch.int64)).shape[-1]))
    sizes = span_sizes(span_tokens, offsets, k)
    for spans, wanted in zip(span_tokens[sizes > 0].long().split(chunk), sizes[sizes > 0].split(chunk), strict=True):
        rows, _ = _rows_of(spans[:, 0], offsets, k)
        exists = torch.arange(k) < wanted.unsqueeze(-1)
        total = read_rows(rows)  # [S, k, D], the sum of the rows so far
        behind = counts[rows]
        parts = torch.ones(len(spans), 1, 1)
        for place in range(1, spans.shape[1]):
            present = spans[:, place] >= 0
            rows, candidates = _rows_of(spans[:, place].clamp(min=0), offsets, k)
            vectors = read_rows(rows)
            distances = torch.cdist(total / parts, vectors, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.masked_fill(~candidates.unsqueeze(1), torch.inf).argmin(-1)  # [S, k]
            matched = vectors.gather(1, nearest.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
            total = torch.where(present.view(-1, 1, 1), total + matched, total)
            behind = torch.where(present.unsqueeze(-1), behind + counts[rows.gather(1, nearest)], behind)
            parts = parts + present.view(-1, 1, 1)
        yield (total / parts)[exists], behind[exists]


def _rows_of(tokens: torch.Tensor, offsets: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k rows of each token [n, k], and which of them exist [n, k]; where none does the row is 0."""
    starts, stops = offsets[tokens], offsets[tokens + 1]
    rows = starts.unsqueeze(-1) + torch.arange(k)
    exists = rows < stops.unsqueeze(-1)
    return torch.where(exists, rows, 0), exists
