"""The machines of a plan: their number, the memory of each, and the speed that the plan assumes for them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dskd.config.section import GB

if TYPE_CHECKING:
    import torch

# Assumptions, each an option of `dskd plan`.
TFLOPS = {"cuda": 400.0, "cpu": 0.1}  # 40 % of an H100's 989 dense bf16; about two cores of a processor
BANDWIDTH = {"one node": 300.0, "nodes": 40.0, "cpu": 1.0}  # NVLink; a 400 Gbit/s adapter for each GPU; gloo
HOST_BANDWIDTH = 25.0  # PCIe 4.0 x16, less the overhead of protocols
DISK_BANDWIDTH = 5.0  # all local NVMe disks of a node together
MEMORY_BANDWIDTH = {"cuda": 2000.0, "cpu": 10.0}  # 60 % of an H100's; about two cores of a processor


@dataclass(frozen=True)
class Cluster:
    """A number of identical nodes.

    With `device` "cpu" a "GPU" is a rank without one, which has a share of the node's memory.
    """

    nodes: int
    gpus_per_node: int
    gpu_memory: int  # bytes of each GPU, or of each rank without one
    host_memory: int  # bytes of each node
    device: Literal["cuda", "cpu"]
    bandwidth: float  # bytes/s that a GPU receives from the others
    host_bandwidth: float  # bytes/s from a host's memory to each of its GPUs
    disk_bandwidth: float  # bytes/s of a node's local disks
    flops: float  # operations per second that a GPU sustains in matrix products
    memory_bandwidth: float = MEMORY_BANDWIDTH["cuda"] * GB  # bytes/s at which a GPU reads its own memory

    @property
    def world_size(self) -> int:
        """Returns the number of ranks, one per GPU."""
        return self.nodes * self.gpus_per_node

    def dtype(self, precision: str) -> "torch.dtype":
        """Returns the type of weights and states.

        `auto` means bf16 on GPUs; on CPUs it is the type that `auto` means on the machine that makes the plan.
        """
        import torch  # imported here so that `dskd plan --help` does not wait for it

        from dskd.models.running.precision import compute_dtype

        if self.device == "cuda":
            return torch.float32 if precision == "fp32" else torch.bfloat16
        return compute_dtype(precision, torch.device("cpu"))
