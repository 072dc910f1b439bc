import pytest
import torch

from dskd.random_numbers import derived_seed, random_bits, uniform

MASK = 2**64 - 1


def _reference(x: int) -> int:
    """splitmix64 in Python's unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_bits_are_those_of_splitmix64():
    for seed, first, second in [(0, 0, 0), (7, 123456789, 5), (2**62, 1, 2**40)]:
        state = seed
        for coordinate in (first, second):
            state = _reference(state ^ _reference(coordinate))
        expected = state & (2**63 - 1)
        assert int(random_bits(seed, torch.tensor(first), torch.tensor(second))) == expected


def test_coordinates_broadcast():
    grid = random_bits(1, torch.arange(3).unsqueeze(-1), torch.arange(4))
    assert grid.shape == (3, 4)
    assert int(grid[2, 1]) == int(random_bits(1, 2, 1))


def test_uniform_numbers_are_uniform():
    numbers = uniform(5, torch.arange(100_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=10, min=0, max=1)
    assert (counts - 10_000).abs().max() < 500  # five standard deviations


def test_every_coordinate_and_the_seed_matter():
    seen = {int(random_bits(seed, a, b)) for seed in (0, 1) for a in range(20) for b in range(20)}
    assert len(seen) == 800


@pytest.mark.parametrize("other", [(1, "b"), (2, "a"), (1, "a", 0)])
def test_derived_seeds_differ(other):
    assert derived_seed(1, "a") != derived_seed(*other)
    assert 0 <= derived_seed(1, "a") < 2**63


def test_integers_can_precede_and_follow_tensors():
    # Everything is computed where the tensors are; on the meta device a mixture of devices would raise.
    keys = torch.arange(3, device="meta")
    assert random_bits(1, keys, 0, torch.arange(2, device="meta").unsqueeze(-1)).device.type == "meta"
    assert random_bits(1, 0, keys, 7).device.type == "meta"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_as_coordinate_gives_what_the_same_number_in_a_tensor_gives(sign):
    last = torch.arange(-2, 5)
    for seed in (0, 7, 2**63 - 1):
        for number in (0, 1, 123_456_789, 2**40, 2**63 - 1):
            number *= sign
            of_numbers = random_bits(seed, number, 3, last, number)
            assert of_numbers.equal(
                random_bits(seed, torch.tensor(number), torch.tensor(3), last, torch.tensor(number))
            )
            expected = seed
            for coordinate in (number, 3):
                expected = _reference(expected ^ _reference(coordinate & MASK))
            assert int(random_bits(seed, number, 3)) == expected & (2**63 - 1)


@pytest.mark.parametrize("count", [0, 1, 5, 2**14, 2**14 + 1])
def test_any_number_of_elements_has_the_bits_of_splitmix64(count):
    at = torch.arange(-3, count - 3) * 2**58
    found = random_bits(3, at).tolist()
    assert len(found) == count
    for index in range(0, count, max(1, count // 50)):
        assert found[index] == _reference(3 ^ _reference(int(at[index]) & MASK)) & (2**63 - 1)
