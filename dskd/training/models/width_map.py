"""The linear map from the states of a student of another width to the teacher's width, and the sums for its fit.

The hidden and the sense term compare states of the student with states of the teacher, or with sense embeddings, which
are means of these. If the student has another width, they read W h instead of h (docs/method.md, section 4). W is
trained with the student, and left out of its export. :mod:`dskd.training.width_fit` sets the values it starts from.

Shapes: N positions, D the student's width, D' the teacher's.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dskd.config import LossConfig
from dskd.distributed.collectives import sum_over_ranks
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder

# Added to the diagonal of the student's second moments, relative to its mean. Without it, states that span fewer than D
# dimensions have no unique fit; with it, the fit is the smallest one.
_RIDGE = 1e-10
# Of Σ |y|²; less is the rounding of sums in float64.
_LEAST_VARIANCE = 1e-12


def width_of_map(loss: LossConfig, student: ModelFolder, teacher: ModelFolder) -> int | None:
    """Returns the width to which the student's states are mapped, the teacher's; None if they are not mapped."""
    own, width = (int(folder.load_config().hidden_size) for folder in (student, teacher))
    return width if has_width_map(loss, own, width) else None


def has_width_map(loss: LossConfig, own: int, width: int) -> bool:
    """Returns True if a term of the loss compares states of a student of width `own` with vectors of another width."""
    return own != width and loss.compares_states


def build_width_map(own: int, width: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """Returns a map from D = `own` to D' = `width`, with all weights 0."""
    layer = nn.Linear(own, width, bias=False, device="meta")  # where torch draws no random numbers for the weights
    layer.weight = nn.Parameter(torch.zeros(width, own, dtype=dtype, device=device))
    return layer


@dataclass
class StateSums:
    """The float64 sums over positions from which the best linear map from vectors x [D] to vectors y [D'] follows."""

    gram: torch.Tensor  # [D, D], of x xᵀ
    cross: torch.Tensor  # [D, D'], of x yᵀ
    total: torch.Tensor  # [D'], of y
    squares: torch.Tensor  # [], of |y|²
    count: torch.Tensor  # [], number of positions

    @classmethod
    def zeros(cls, own: int, width: int, device: torch.device) -> "StateSums":
        """Returns sums over no positions, for D = `own` and D' = `width`."""
        return cls(
            *(
                torch.zeros(size, dtype=torch.float64, device=device)
                for size in ((own, own), (own, width), width, (), ())
            )
        )

    def add(self, states: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds N positions: `states` [N, D] and `targets` [N, D']."""
        states, targets = states.double(), targets.double()
        self.gram.addmm_(states.T, states)
        self.cross.addmm_(states.T, targets)
        self.total += targets.sum(0)
        self.squares += targets.square().sum()
        self.count += len(states)

    def sum_over_ranks(self) -> None:
        """Adds the sums of all ranks; every rank must call it."""
        for values in (self.gram, self.cross, self.total, self.squares, self.count):
            sum_over_ranks(values)

    def solve(self) -> tuple[torch.Tensor, float]:
        """Returns W [D', D], which minimises Σ |y - W x|², and its R².

        R² is 1 - Σ |y - W x|² / Σ |y - mean of y|²: the share of the variance of y, over all of its components, that
        W x explains. It is negative if the mean of y would be nearer, which W x cannot be without a constant, and 0 if
        y has no variance.

        Raises:
            UserError: if there are no positions.
        """
        if not self.count:
            raise UserError(
                "no position of the first training sequences counts in the loss, so the map from the student's states "
                "to the teacher's width cannot be fitted; add text, or for chats set corpus.loss_on: all",
                known_to_all_ranks=True,
            )
        ridge = (_RIDGE * self.gram.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
        moments = self.gram.clone()
        moments.diagonal().add_(ridge)
        weight = torch.cholesky_solve(self.cross, torch.linalg.cholesky(moments))  # [D, D']
        residual = self.squares - 2 * (weight * self.cross).sum() + (weight * (self.gram @ weight)).sum()
        variance = self.squares - self.total.square().sum() / self.count
        has_variance = variance > _LEAST_VARIANCE * self.squares
        return weight.T.contiguous(), 1 - float(residual / variance) if has_variance else 0.0
