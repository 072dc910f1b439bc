"""Senses of spans of two and three tokens, composed of their tokens' senses (method, section 2)."""

import torch

_CHUNK = 4096


def compose_spans(
    span_tokens: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor, offsets: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sense per sense of the first token: each further token adds the sense nearest to the mean of the rows so far.

    A span one of whose tokens has no sense has none either.

    Args:
        span_tokens: [S, 3], padded with -1.
        vectors: [R, D], the senses of the tokens.
        counts: [R], states behind each.
        offsets: [V+1], rows of token v are offsets[v]:offsets[v+1].
        k: senses a token has at most.

    Returns:
        Vectors [R', D] float32, states behind each [R'] (those of all its parts), and rows of each span [S].
    """
    hidden_size = vectors.shape[1]
    all_vectors, all_counts, all_sizes = [torch.empty(0, hidden_size)], [torch.empty(0, dtype=torch.int64)], []
    for spans in span_tokens.long().split(_CHUNK):
        rows, exists = _rows_of(spans[:, 0], offsets, k)
        complete = exists.any(-1)
        total = vectors[rows].float()  # [S, k, D], the sum of the rows so far
        behind = counts[rows]
        parts = torch.ones(len(spans), 1, 1)
        for place in range(1, spans.shape[1]):
            present = spans[:, place] >= 0
            rows, candidates = _rows_of(spans[:, place].clamp(min=0), offsets, k)
            complete &= candidates.any(-1) | ~present
            distances = torch.cdist(total / parts, vectors[rows].float(), compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.masked_fill(~candidates.unsqueeze(1), torch.inf).argmin(-1)  # [S, k]
            matched = rows.gather(1, nearest)
            total = torch.where(present.view(-1, 1, 1), total + vectors[matched].float(), total)
            behind = torch.where(present.unsqueeze(-1), behind + counts[matched], behind)
            parts = parts + present.view(-1, 1, 1)
        exists &= complete.unsqueeze(-1)
        all_vectors.append((total / parts)[exists])
        all_counts.append(behind[exists])
        all_sizes.append(exists.sum(-1))
    sizes = torch.cat(all_sizes) if all_sizes else torch.empty(0, dtype=torch.int64)
    return torch.cat(all_vectors), torch.cat(all_counts), sizes


def _rows_of(tokens: torch.Tensor, offsets: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k rows of each token [n, k], and which of them exist [n, k]; where none does the row is 0."""
    starts, stops = offsets[tokens], offsets[tokens + 1]
    rows = starts.unsqueeze(-1) + torch.arange(k)
    exists = rows < stops.unsqueeze(-1)
    return torch.where(exists, rows, 0), exists
