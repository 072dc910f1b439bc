"""Muon in float32, for teachers that are trained in float32."""

from collections.abc import Callable
from typing import Any

import torch

# Of Keller Jordan's quintic iteration (kellerjordan.github.io/posts/muon), with the defaults of torch.optim.Muon.
_COEFFICIENTS, _ITERATIONS, _MOMENTUM, _EPSILON = (3.4445, -4.7750, 2.0315), 5, 0.95, 1e-7


class Float32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with its defaults and no weight decay, but with products in float32.

    torch always orthogonalises in bfloat16. A processor without instructions for that type emulates it, which took 45
    times as long as float32 and nearly all of the training (measured 2026-11-30 on two cores with AVX2).
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        """Takes matrices [m, n] and their learning rate."""
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates each matrix by its orthogonalised momentum."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                update = orthogonalize(parameter.grad.lerp(momentum, _MOMENTUM))  # Nesterov's momentum
                rows, columns = parameter.shape
                parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Returns U S Vᵀ with singular values S near 1 for a matrix [m, n] with the singular vectors U and V."""
    a, b, c = _COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=_EPSILON)  # the iteration needs singular values of at most 1
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
