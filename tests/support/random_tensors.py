"""Random tensors for tests of numbers."""

import torch


def random_float64(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns normally distributed numbers in float64, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
