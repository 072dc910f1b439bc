"""The rendezvous of ranks: how they find each other, and which are missing if they do not."""

import datetime
import math
import os
import socket
import time

import torch
import torch.distributed as dist

from dskd.distributed.world import World, current_rank, uses_gpu
from dskd.errors import LostPeerError, OutageError, UserError, first_line, listed

DEFAULT_TIMEOUT_S = 1800


def initialize(timeout_s: int = DEFAULT_TIMEOUT_S) -> World:
    """Joins the process group that the launcher's variables describe (one rank if there are none).

    A collective that waits longer than `timeout_s` raises on every rank, so that a lost peer ends the job instead of
    hanging it.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    _read_launcher()
    rank, world_size = current_rank(), int(os.environ["WORLD_SIZE"])
    store = None
    if not dist.is_initialized():
        store = _meet_at_store(timeout)
        _find_local_ranks(store, rank, world_size)
    # DeepSpeed's launcher sets LOCAL_SIZE, but mosaicml-streaming reads LOCAL_WORLD_SIZE. Without it every rank would
    # consider itself the first of its node, and the second one would fail on the first one's shared memory.
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if uses_gpu() else torch.device("cpu")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each rank would use all cores, and the ranks of a node would compete for them.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    if device.type == "cuda":
        _require_device(local_rank)
        torch.cuda.set_device(device)
    if store is not None:
        import deepspeed
        import deepspeed.ops

        # The shared-memory op of CPU ranks is compiled at first use and needs a C++ compiler; gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("dskd", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device
            if device.type == "cuda"
            else None,  # without it NCCL guesses the device and warns at every barrier
        )
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)  # adopts the process group
    return World(rank, world_size, local_rank, device)


def _read_launcher() -> None:
    """Checks the launcher's variables before anything waits for other ranks, and completes those of a single rank.

    Raises:
        UserError: naming every variable that is missing or wrong.
    """
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        # A single process: replace whatever else is set, as it has no meaning then.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return
    if "LOCAL_SIZE" not in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]  # torchrun's name for it
    problems, numbers = [], {}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT")
    for name in names:
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            problems.append(f"{name}: expected a whole number, found {text!r}")
        elif text is not None:
            numbers[name] = int(text)
    variables = [f"{name}={os.environ[name]}" for name in (*names, "MASTER_ADDR") if name in os.environ]
    required = ["RANK", "WORLD_SIZE"]
    if numbers.get("WORLD_SIZE", 1) > 1:
        required += ["MASTER_ADDR", "MASTER_PORT"]
    problems += [f"{name}: is not set, although {', '.join(variables)}" for name in required if name not in os.environ]
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_SIZE"), ("LOCAL_RANK", "WORLD_SIZE")):
        if name in numbers and limit in numbers and numbers[name] >= numbers[limit]:
            problems.append(f"{name}: is {numbers[name]} of {limit}={numbers[limit]} (ranks count from 0)")
            break
    if numbers.get("LOCAL_SIZE", 1) > numbers.get("WORLD_SIZE", math.inf):
        problems.append(f"LOCAL_SIZE: is {numbers['LOCAL_SIZE']}, more than WORLD_SIZE={numbers['WORLD_SIZE']}")
    if not 0 < numbers.get("MASTER_PORT", 1) < 65536:
        problems.append(f"MASTER_PORT: expected 1 to 65535, found {numbers['MASTER_PORT']}")
    if problems:
        raise UserError(
            listed("the environment does not describe this rank", problems)
            + "\nStart with a launcher that sets these variables (`deepspeed`, `torchrun`), or unset RANK and "
            "WORLD_SIZE for a single process"
        )
    if numbers["WORLD_SIZE"] == 1:
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("LOCAL_SIZE", "1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))


def _find_local_ranks(store: dist.Store, rank: int, world_size: int) -> None:
    """Sets LOCAL_RANK and LOCAL_SIZE if the launcher (such as Kubernetes' PyTorchJob) did not.

    Derives them from the host names of all ranks, which every rank must have put into the store.
    """
    if "LOCAL_RANK" in os.environ and "LOCAL_SIZE" in os.environ:
        return
    hosts = [host.decode() for host in store.multi_get([f"rank {other}" for other in range(world_size)])]
    os.environ.setdefault("LOCAL_RANK", str(hosts[:rank].count(hosts[rank])))
    os.environ.setdefault("LOCAL_SIZE", str(hosts.count(hosts[rank])))


def _require_device(local_rank: int) -> None:
    """Checks that the node has a GPU for this rank.

    Raises:
        UserError: naming the local rank and the number of GPUs, if it has none.
    """
    devices = torch.cuda.device_count()
    if local_rank >= devices:
        raise UserError(
            f"{socket.gethostname()}: LOCAL_RANK is {local_rank} (from 0), and this node has {devices} "
            f"GPU{'s' * (devices != 1)}; start as many ranks as there are GPUs (`deepspeed --num_gpus {devices}`; "
            "CUDA_VISIBLE_DEVICES hides some), or use the CPU with DS_ACCELERATOR=cpu"
        )


def _meet_at_store(timeout: datetime.timedelta) -> dist.Store:
    """Connects to the store on rank 0's node and waits for all ranks; torch alone would not say which are missing.

    Raises:
        LostPeerError: naming the missing ranks and their nodes.
        OutageError: if rank 0 cannot open the store.
    """
    rank, world_size = current_rank(), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    remedy = "look at that node, and start all ranks again"
    if rank != 0:
        _wait_for_port(address, port, timeout.total_seconds())
    try:
        store = dist.TCPStore(address, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
        store.set(f"rank {rank}", socket.gethostname())
    except dist.DistNetworkError as error:
        if rank == 0:
            raise OutageError(_explain_no_store(address, port, error)) from error
        raise LostPeerError(f"[rank {rank}, {socket.gethostname()}] rank 0 has ended; {remedy}") from error
    try:
        store.wait([f"rank {other}" for other in range(world_size)], timeout)
    except dist.DistError as error:
        raise LostPeerError(
            f"[rank {rank}, {socket.gethostname()}] {_describe_missing(store, world_size)} within "
            f"{timeout.total_seconds():.0f} s; {remedy}"
        ) from error
    return store


def _explain_no_store(address: str, port: int, error: Exception) -> str:
    host = socket.gethostname()
    try:
        socket.create_server(("", port)).close()
    except OSError as refused:
        reason = os.strerror(refused.errno or 0)
        return (
            f"{host}: rank 0 cannot listen on port {port} ({reason}); wait for the job that uses it, or name another "
            "port with `deepspeed --master_port PORT` (MASTER_PORT)"
        )
    reason = first_line(error)
    return f"{host}: rank 0 cannot be reached at {address}:{port} ({reason}); MASTER_ADDR must name the node of rank 0"


def _wait_for_port(address: str, port: int, timeout_s: float) -> None:
    """Waits until rank 0 listens.

    torch's store would wait too, but several times as long, and would fail with a stack of C++ frames.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostPeerError(
                    f"[rank {current_rank()}, {socket.gethostname()}] rank 0 does not answer at {address}:{port} "
                    f"within {timeout_s:.0f} s ({error}); look at that node, and start all ranks again"
                ) from error
            time.sleep(0.2)


def _describe_missing(store: dist.Store, world_size: int) -> str:
    try:
        missing = [rank for rank in range(world_size) if not store.check([f"rank {rank}"])]
        joined = sorted({store.get(f"rank {rank}").decode() for rank in range(world_size) if rank not in missing})
    except dist.DistError:
        return "not all ranks joined, and rank 0 has ended: read its messages"
    nodes = sorted({rank // int(os.environ.get("LOCAL_SIZE", "1")) for rank in missing})
    return (
        f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}, of node{'s' * (len(nodes) > 1)} "
        f"{', '.join(map(str, nodes))} (from 0, as in the hostfile), did not join (joined: {', '.join(joined)})"
    )


def shutdown() -> None:
    """Leaves the process group, so that the process ends without a warning from the backend."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_address() -> str:
    """Returns the address of this node on the network through which it reaches the node of rank 0."""
    master = socket.getaddrinfo(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(master[0], socket.SOCK_DGRAM) as probe:
        probe.connect(master[4])  # sends nothing
        return str(probe.getsockname()[0])


def free_port() -> int:
    """Returns a port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
