"""The rank and device of this process, the number of ranks, and the launcher's environment variables."""

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What a launcher says of a process: DeepSpeed's says LOCAL_SIZE, torchrun's LOCAL_WORLD_SIZE.
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


def current_rank() -> int:
    """Returns the rank that the launcher gave this process; 0 if there is none or it is not a number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def is_main_process() -> bool:
    """Returns True on rank 0, even before the process group exists."""
    return current_rank() == 0


def launcher_job() -> dict[str, str]:
    """Returns the scheduler's job of this process: `scheduler`, `id` and further facts; {} if there is none."""
    slurm = {"id": "JOB_ID", "name": "JOB_NAME", "array": "ARRAY_JOB_ID", "task": "ARRAY_TASK_ID"}
    slurm["restart"] = "RESTART_COUNT"  # number of times the job was requeued
    if "SLURM_JOB_ID" in os.environ:
        found = {name: os.environ.get(f"SLURM_{variable}") for name, variable in slurm.items()}
        return {"scheduler": "slurm"} | {name: text for name, text in found.items() if text}
    # The manifests in cluster/kubernetes set DSKD_JOB to the Job's name. A pod's host name is the Job's name with an
    # index.
    if "KUBERNETES_SERVICE_HOST" in os.environ or "JOB_COMPLETION_INDEX" in os.environ:
        pod = socket.gethostname()
        return {"scheduler": "kubernetes", "id": os.environ.get("DSKD_JOB") or pod, "pod": pod}
    return {}


def leave_launcher() -> None:
    """Removes a job's rank variables from the environment of this process.

    For programs of one process: in a pod or an interactive job they would otherwise print only on rank 0.
    """
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
