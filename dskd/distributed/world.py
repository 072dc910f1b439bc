"""The rank and device of this process, the number of ranks, and the launcher's environment variables."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The variables in which a launcher describes a process: DeepSpeed sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")


def uses_gpu() -> bool:
    """Returns True if there is a GPU and DeepSpeed's own switch, `DS_ACCELERATOR=cpu`, does not exclude it."""
    import torch  # takes seconds to import

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


@dataclass(frozen=True)
class World:
    """The place of this process among all ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints, tracks and publishes artifacts."""
        return self.rank == 0

    def turns(self, count: int) -> Iterator[int | None]:
        """Yields every `world_size`-th number below `count`, from this rank's own number on: the ranks take turns.

        All ranks get equally many, because all must take part in a forward pass of a sharded model: a rank that has no
        work in the last turn gets None.
        """
        for first in range(0, count, self.world_size):
            yield number if (number := first + self.rank) < count else None


def current_rank() -> int:
    """Returns the rank that the launcher gave this process; 0 if there is none or it is not a number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def launched_ranks() -> int:
    """Returns the number of ranks that the launcher started; 1 if it says none or what is not a number."""
    text = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def is_main_process() -> bool:
    """Returns True on rank 0, even before the process group exists."""
    return current_rank() == 0


def launcher_job() -> dict[str, str]:
    """Returns the facts about the scheduler's job that the scripts of `cluster/` export; {} without them.

    `scheduler` (`slurm` or `kubernetes`), `id`, `name`, `pod`, of an array its `array` and `task`, and `restart`, the
    number of times it was requeued.
    """
    names = ("scheduler", "id", "name", "array", "task", "restart", "pod")
    facts = {name: os.environ.get(f"DSKD_JOB_{name.upper()}") for name in names}
    return {name: text for name, text in facts.items() if text}


def leave_launcher() -> None:
    """Removes a job's rank variables from the environment of this process.

    For programs of one process: in a pod or an interactive job they would otherwise print only on rank 0.
    """
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
