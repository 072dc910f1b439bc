"""Random numbers that depend on their purpose, not on the order in which they are drawn.

A number from a generator depends on how many were drawn before, and so on batches, ranks and restarts. Here a number is
computed from a seed and the coordinates of what it is used for (document, position, token …).
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

# Constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in two's complement for torch's int64.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_MASK = 2**64 - 1
_FEW = 2**14  # elements; torch computes with several threads on more


def derived_seed(seed: int, *parts: int | str) -> int:
    """Returns a 63-bit seed that depends on `seed` and every part only, not on ranks, order or process."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_bits(seed: int, *coordinates: torch.Tensor | int) -> torch.Tensor:
    """Returns 63 uniform bits as int64 >= 0 for every element of the broadcast `coordinates` (int64 tensors, ints)."""
    device = next((c.device for c in coordinates if isinstance(c, torch.Tensor)), torch.device("cpu"))
    if device.type == "cpu":
        shape = np.broadcast_shapes(*(c.shape for c in coordinates if isinstance(c, torch.Tensor)))
        if math.prod(shape) <= _FEW:
            return torch.from_numpy(_random_bits_of_few(seed, coordinates)).reshape(shape)

    def mix(x: torch.Tensor | int) -> torch.Tensor | int:
        if not isinstance(x, torch.Tensor):
            return _splitmix64_of_number(int(x))  # NumPy's integers would overflow
        return _splitmix64(x.to(device, torch.int64))

    # Before the first tensor, the state is a number, with which Python computes much faster than torch.
    state: torch.Tensor | int = int(seed)
    for coordinate in coordinates:
        state = mix(state ^ mix(coordinate))
    return torch.as_tensor(state, dtype=torch.int64, device=device) & (2**63 - 1)


def uniform(seed: int, *coordinates: torch.Tensor | int) -> torch.Tensor:
    """Returns uniform numbers in [0, 1) as float64, for every element of the broadcast `coordinates`."""
    return (random_bits(seed, *coordinates) >> 10).double() / 2**53


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _random_bits_of_few(seed: int, coordinates: Sequence[torch.Tensor | int]) -> np.ndarray:
    """Returns what :func:`random_bits` returns, as an array with as many elements; NumPy is faster at small arrays."""

    def mix(x: np.ndarray | int) -> np.ndarray | int:
        return _splitmix64_of_array(x) if isinstance(x, np.ndarray) else _splitmix64_of_number(x)

    state: np.ndarray | int = int(seed)
    for coordinate in coordinates:
        if isinstance(coordinate, torch.Tensor):
            # With one dimension at least: without any, NumPy would warn of overflow.
            state = mix(state ^ mix(np.atleast_1d(coordinate.numpy()).astype(np.int64, copy=False)))
        else:
            state = mix(state ^ mix(int(coordinate)))
    return np.atleast_1d(state & (2**63 - 1))


def _splitmix64_of_array(x: np.ndarray) -> np.ndarray:
    """Returns what :func:`_splitmix64` returns, for an array of int64."""
    bits = x.view(np.uint64) + np.uint64(_GAMMA & _MASK)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_MIX_1 & _MASK)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_MIX_2 & _MASK)
    return (bits ^ (bits >> np.uint64(31))).view(np.int64)


def _splitmix64_of_number(x: int) -> int:
    """Returns what :func:`_splitmix64` returns of an int64, as an int64."""
    x = (x + _GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    x ^= x >> 31
    return x - 2**64 if x >> 63 else x


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts right and fills with zeros: torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
