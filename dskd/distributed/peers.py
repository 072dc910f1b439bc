"""Detection of lost ranks: a failed collective reports a time-out or a closed connection, but not of which rank.

Every rank listens on a port without accepting connections: the kernel answers for a process as long as it lives,
whatever it is busy with. So a refused connection means that the process has ended, and no answer means that the node
cannot be reached.
"""

import contextlib
import itertools
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dskd.distributed.collectives import gather_json
from dskd.distributed.rendezvous import own_address
from dskd.distributed.world import World

_PATIENCE_S = 3.0


@dataclass(frozen=True)
class Peers:
    """The other ranks of the job, with the address on which each listens."""

    listener: socket.socket  # open as long as this process lives
    host: str
    ranks: list[dict[str, Any]]  # rank, host, address, port

    def find_lost(self) -> str | None:
        """Contacts every other rank; returns a text that names the lost ranks, or None if all answer."""
        with ThreadPoolExecutor(max_workers=min(64, len(self.ranks) + 1)) as pool:
            answers = list(pool.map(_ask, self.ranks))
        missing = [
            (answer, peer["host"], peer["rank"]) for answer, peer in zip(answers, self.ranks, strict=True) if answer
        ]
        groups = itertools.groupby(sorted(missing), key=lambda peer: peer[:2])
        return "; ".join(_describe([rank for *_, rank in peers], *key) for key, peers in groups) or None


def meet_peers(world: World) -> Peers:
    """Starts to listen and exchanges addresses with all other ranks. Every rank must call it."""
    address = own_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=max(128, world.world_size))
    host = socket.gethostname()
    own_entry = {"rank": world.rank, "host": host, "address": address, "port": listener.getsockname()[1]}
    others = [peer for peer in gather_json(own_entry) if peer["rank"] != world.rank]
    return Peers(listener, host, others)


def _ask(peer: dict[str, Any]) -> str | None:
    try:
        with contextlib.closing(socket.create_connection((peer["address"], peer["port"]), timeout=_PATIENCE_S)):
            return None
    except ConnectionRefusedError:
        return "not there any more"
    except OSError:
        return "cannot be reached"


def _describe(ranks: list[int], answer: str, host: str) -> str:
    verb = "" if answer.startswith("cannot") else "is " if len(ranks) == 1 else "are "
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ({host}) {verb}{answer}"
