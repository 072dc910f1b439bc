"""Lists of different lengths in one tensor (CSR): list j is values[offsets[j]:offsets[j + 1]]."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Csr:
    """A sequence of lists of numbers, one after the other."""

    offsets: torch.Tensor  # [number of lists + 1] int64
    values: torch.Tensor

    @property
    def sizes(self) -> torch.Tensor:
        """The length of each list."""
        return self.offsets.diff()

    @property
    def owners(self) -> torch.Tensor:
        """For each of the values, the number of its list."""
        return torch.arange(len(self.offsets) - 1).repeat_interleave(self.sizes)

    def of(self, number: int) -> list[int]:
        """Returns one list."""
        return self.values[int(self.offsets[number]) : int(self.offsets[number + 1])].tolist()

    def to(self, device: torch.device) -> "Csr":
        """Returns the lists on a device."""
        return Csr(self.offsets.to(device), self.values.to(device))


def offsets_of(sizes: torch.Tensor) -> torch.Tensor:
    """Returns the offsets [n+1] of n lists with these lengths."""
    return F.pad(sizes.cumsum(0), (1, 0))


def sums_of_lists(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each list."""
    return offsets_of(values)[offsets].diff()


def ranges(starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Returns the integers starts[j] … starts[j] + sizes[j] - 1 for every j, concatenated."""
    return torch.arange(int(sizes.sum())) + (starts - offsets_of(sizes)[:-1]).repeat_interleave(sizes)


def padded_ranges(starts: torch.Tensor, sizes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the integers from starts[j] on in row j of a table [n, width], at most sizes[j] of them.

    Also returns a mask [n, width] of these integers. The others are 0, so that the table can be used as an index.
    """
    index = torch.arange(width, device=starts.device)
    exists = index < sizes.unsqueeze(-1)
    return torch.where(exists, starts.unsqueeze(-1) + index, 0), exists
