"""Lists in one tensor, against plain Python lists."""

import torch

from dskd.senses.csr import Csr, offsets_of, padded_ranges, ranges, sums_of_lists

LISTS = [[5, 1], [], [7, 7, 2], [4]]
SIZES = torch.tensor([len(one) for one in LISTS])
CSR = Csr(offsets_of(SIZES), torch.tensor([value for one in LISTS for value in one]))


def test_lists_come_back_as_they_went_in():
    assert CSR.sizes.tolist() == [2, 0, 3, 1]
    assert [CSR.of(number) for number in range(4)] == LISTS
    assert CSR.owners.tolist() == [0, 0, 2, 2, 2, 3]
    assert sums_of_lists(CSR.values, CSR.offsets).tolist() == [sum(one) for one in LISTS]


def test_no_lists_and_empty_lists_are_fine():
    empty = Csr(offsets_of(torch.zeros(0, dtype=torch.int64)), torch.zeros(0, dtype=torch.int64))
    assert empty.sizes.tolist() == empty.owners.tolist() == []
    assert ranges(torch.tensor([3, 8]), torch.tensor([0, 0])).tolist() == []


def test_ranges_are_the_integers_from_each_start_on():
    starts, sizes = torch.tensor([8, 3, 0]), torch.tensor([2, 0, 3])
    assert ranges(starts, sizes).tolist() == [8, 9, 0, 1, 2]
    table, exists = padded_ranges(starts, sizes, 2)
    assert table.tolist() == [[8, 9], [0, 0], [0, 1]]  # a row keeps no more than `width` of its integers
    assert exists.tolist() == [[True, True], [False, False], [True, True]]
