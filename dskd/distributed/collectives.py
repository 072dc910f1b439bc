"""Collective operations: sums, broadcasts and barriers over all ranks.

Everything here also works in a plain process without a launcher: then there is one rank, and collectives are the
identity.
"""

import json
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dskd.distributed.world import World, is_main_process
from dskd.errors import OutageError, UserError

T = TypeVar("T")


if not torch.cuda.is_available():
    # DeepSpeed would detect this itself, but with a warning in every process.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums `values` elementwise over all ranks, in place, and returns them; every rank must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(value: bool, world: World) -> bool:
    """Returns True if `value` is true on any rank; every rank must call it."""
    return bool(sum_over_ranks(torch.tensor([value], dtype=torch.int32, device=world.device)).item())


def barrier() -> None:
    """Waits until every rank has called it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def broadcast_json(value: Any) -> Any:
    """Returns rank 0's `value` on every rank. Uses JSON, so that no machine unpickles data of another."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return json.loads(json.dumps(value))
    device = _communication_device()
    payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([payload.numel()], device=device)
    dist.broadcast(size, src=0)
    if not is_main_process():
        payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(payload, src=0)
    return json.loads(bytes(payload.tolist()))


def gather_json(value: Any) -> list[Any]:
    """Returns every rank's JSON-like `value` on every rank, in the order of ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    device = _communication_device()
    payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([payload.numel()], device=device))
    # all_gather needs tensors of one size: pad all to the longest, and cut them to their sizes again.
    longest = max(int(size) for size in sizes)
    parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(payload, (0, longest - payload.numel())))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


def on_main(function: Callable[[], Any]) -> Any:
    """Runs `function` on rank 0 and returns its JSON-like result on every rank, or raises its UserError on every rank.

    Every rank must call it, outside any other collective. The other ranks wait for rank 0, up to the collective
    time-out.
    """
    result: Any = None
    error: str | None = None
    is_outage = False
    if is_main_process():
        try:
            result = function()
        except UserError as problem:
            error, is_outage = str(problem), isinstance(problem, OutageError)
    reply = broadcast_json({"result": result, "error": error, "is_outage": is_outage})
    if reply["error"] is not None:
        raise (OutageError if reply["is_outage"] else UserError)(reply["error"], known_to_all_ranks=True)
    return reply["result"]


def main_first(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0, then on the others: for work whose costly part rank 0 leaves in a cache.

    A UserError of rank 0 is raised on every rank. If only another rank has one, it is not the user's mistake but a
    fault of that rank's node, such as an outdated view of the shared storage: it becomes an OutageError that names the
    node.
    """
    own_result: list[T] = []
    on_main(lambda: own_result.append(function()))
    if own_result:
        return own_result[0]
    try:
        return function()
    except UserError as error:
        raise OutageError(
            f"{socket.gethostname()}: {error}\nRank 0 found no such problem, so this node has a problem: it may "
            "see an old state of the shared storage, or none of it. Start all ranks again; if that does not help, "
            "without this one",
            unknown_to_rank_0=True,
        ) from error


def _communication_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
