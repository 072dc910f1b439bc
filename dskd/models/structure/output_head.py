"""The output head of a model: from its last hidden states to logits.

Logits are the products of states and output matrix. Some architectures scale these (Cohere, Granite, Falcon-H1,
MiniCPM), or cap them smoothly (Gemma 2). :mod:`dskd.models.checks.head_probe` finds out what a model does.

Shapes: N positions, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class LogitTransform:
    """The step from the products z of states and output matrix to logits: z · scale or, with a cap c, c · tanh(z ·
    scale / c).
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """True if the products are the logits."""
        return self.scale == 1 and self.cap is None

    def apply(self, products: torch.Tensor) -> torch.Tensor:
        """Returns the logits [N, V] of the products [N, V] in float32 or wider; the products if they are the logits."""
        if self.is_identity:
            return products
        logits = products.to(torch.promote_types(products.dtype, torch.float32), copy=True)
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def pull_back(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turns a gradient for the logits [N, V] into the gradient for the products, in place, and returns it.

        Uses the memory of `logits`, which :meth:`apply` has returned.
        """
        if self.cap is not None:
            # The derivative of c · tanh(x / c) is 1 - tanh(x / c)², and the logit has this tanh.
            gradient.addcmul_(gradient, logits.div_(self.cap).square_(), value=-1)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


class OutputHead(NamedTuple):
    """A model's output matrix, while it is gathered, and what the model does with the products."""

    weight: torch.Tensor  # [V, D]
    transform: LogitTransform = LogitTransform()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the logits […, V] of states […, D], in float32."""
        return self.transform.apply(F.linear(states, self.weight).float())
