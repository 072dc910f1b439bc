"""Which rank a process is, of how many, and on which device; the variables of the launcher."""

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def uses_gpu() -> bool:
    """True where there is a GPU, unless DeepSpeed's own switch, `DS_ACCELERATOR=cpu`, says to leave it alone."""
    import torch  # takes seconds to import

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


@dataclass(frozen=True)
class World:
    """Where this process stands among all ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        """True on the rank that prints, tracks and publishes artifacts."""
        return self.rank == 0


def current_rank() -> int:
    """The rank the launcher gave this process; 0 when nothing launched it, or not with a number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def is_main_process() -> bool:
    """True on rank 0, also before the process group exists."""
    return current_rank() == 0


def launcher_job() -> dict[str, str]:
    """The scheduler's job that this process belongs to: `scheduler`, `id` and what else it says; {} without one."""
    slurm = {"id": "JOB_ID", "name": "JOB_NAME", "array": "ARRAY_JOB_ID", "task": "ARRAY_TASK_ID"}
    slurm["restart"] = "RESTART_COUNT"  # how often the job was requeued
    if "SLURM_JOB_ID" in os.environ:
        found = {name: os.environ.get(f"SLURM_{variable}") for name, variable in slurm.items()}
        return {"scheduler": "slurm"} | {name: text for name, text in found.items() if text}
    # The manifests of cluster/kubernetes name the Job; a pod's host name is that of the Job and its number.
    if "KUBERNETES_SERVICE_HOST" in os.environ or "JOB_COMPLETION_INDEX" in os.environ:
        pod = socket.gethostname()
        return {"scheduler": "kubernetes", "id": os.environ.get("DSKD_JOB") or pod, "pod": pod}
    return {}
