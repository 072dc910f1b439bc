"""Random numbers that are a function of what they are for, not of the order in which they are drawn.

A generator's stream depends on how many numbers were drawn before, and so on batches, ranks and restarts. Here a number
is computed from a seed and the coordinates of the thing it decides about (document, position, token …).
"""

import hashlib

import torch

# splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in the two's complement that torch's int64 has.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def derived_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and every part, and on nothing else: not on ranks, order or process."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_bits(seed: int, *coordinates: torch.Tensor | int) -> torch.Tensor:
    """63 uniform bits as int64 >= 0, for every element of the broadcast `coordinates` (int64 tensors or integers)."""
    device = next((c.device for c in coordinates if isinstance(c, torch.Tensor)), torch.device("cpu"))
    state = torch.tensor(seed, dtype=torch.int64, device=device)
    for coordinate in coordinates:
        state = _splitmix64(state ^ _splitmix64(torch.as_tensor(coordinate, dtype=torch.int64, device=device)))
    return state & (2**63 - 1)


def uniform(seed: int, *coordinates: torch.Tensor | int) -> torch.Tensor:
    """float64 in [0, 1), for every element of the broadcast `coordinates`."""
    return (random_bits(seed, *coordinates) >> 10).double() / 2**53


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
