"""The texts of the installed torch's errors, each from the real failure."""

import os
import shutil
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from dskd.distributed.shared_memory import FOLDER
from dskd.distributed.torch_errors import is_death_of_worker, is_lack_of_shared_memory


@pytest.mark.parametrize(
    ("end", "is_lack"),
    [
        (lambda: os._exit(1), False),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), False),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), True),
    ],
    ids=["exit", "kill", "bus error"],
)
def test_the_death_of_a_worker_is_recognised(end, is_lack):
    class Dying:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            end()

    with pytest.raises(RuntimeError) as raised:
        next(iter(DataLoader(Dying(), num_workers=1)))
    assert is_death_of_worker(raised.value)
    assert is_lack_of_shared_memory(raised.value) == is_lack


def test_a_tensor_without_room_in_shared_memory_is_recognised():
    size = 2 * shutil.disk_usage(FOLDER).total
    with pytest.raises(RuntimeError) as raised:
        torch.UntypedStorage._new_shared(size)
    assert is_lack_of_shared_memory(raised.value)
    assert not is_death_of_worker(raised.value)


def test_other_errors_of_torch_are_not_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_death_of_worker(raised.value)
    assert not is_lack_of_shared_memory(raised.value)
