"""Composes the senses of spans of two and three tokens from their tokens' senses (docs/method.md, section 2)."""

from collections.abc import Callable, Iterator

import torch

from dskd.senses.csr import padded_ranges

_ELEMENTS = 8_000_000  # floats in the rows of the spans that are composed at once


def span_sizes(span_tokens: torch.Tensor, offsets: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the number of senses [S] of each span: that of its first token, up to k, or 0 if any token has no sense.

    `span_tokens` [S, 3] is padded with -1, and the rows of token v are offsets[v]:offsets[v+1].
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
    """Composes one sense of a span from each sense of its first token; the arguments are as in :func:`span_sizes`.

    Each further token contributes its sense nearest to the mean of the senses so far. The span's sense is the mean.
    `read_rows` returns the tokens' senses, float32 [..., D], for row numbers [...], and `counts` [R] is the number of
    states that each row represents.

    Yields, for some spans at a time, vectors [r, D] float32, and the number of states [r] that all parts of each
    represent. All batches together hold the senses of all spans in order.
    """
    chunk = max(1, _ELEMENTS // (k * read_rows(torch.zeros(1, dtype=torch.int64)).shape[-1]))
    numbers = offsets.diff()
    for spans in span_tokens[span_sizes(span_tokens, offsets, k) > 0].long().split(chunk):
        # Start with the senses of the first token, at most k; `exists` [S, k] is the mask of the span's senses.
        rows, exists = padded_ranges(offsets[spans[:, 0]], numbers[spans[:, 0]], k)
        total = read_rows(rows)  # [S, k, D], the sum of the rows so far
        states = counts[rows]
        parts = torch.ones(len(spans), 1, 1)
        for column in range(1, spans.shape[1]):
            # The senses of the next token, for the spans that have one.
            present = spans[:, column] >= 0
            tokens = spans[:, column].clamp(min=0)
            rows, candidates = padded_ranges(offsets[tokens], numbers[tokens], k)
            # Find the sense nearest to each mean, exactly: without the product form, which loses digits.
            vectors = read_rows(rows)
            distances = torch.cdist(total / parts, vectors, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.masked_fill(~candidates.unsqueeze(1), torch.inf).argmin(-1)  # [S, k]
            # Spans without a token at this place keep their sum.
            matched = vectors.gather(1, nearest.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
            total = torch.where(present.view(-1, 1, 1), total + matched, total)
            states = torch.where(present.unsqueeze(-1), states + counts[rows.gather(1, nearest)], states)
            parts = parts + present.view(-1, 1, 1)
        yield (total / parts)[exists], states[exists]
