"""Squared distances between points and centres, in batches."""

import torch


def squared_distances(points: torch.Tensor, norms: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Computes |x - c|² [G, N, K] of points [G, N, D], with their squared norms [G, N], and centers [G, K, D]."""
    # |x|² - 2 x·c + |c|² needs one batched product, and no difference of shape [G, N, K, D].
    products = torch.bmm(points, centers.transpose(1, 2))
    return (norms.unsqueeze(-1) - 2 * products + centers.square().sum(-1).unsqueeze(1)).clamp(min=0)
