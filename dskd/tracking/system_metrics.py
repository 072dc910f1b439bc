"""System metrics: use of processors, memory, disks, network and GPUs, read by the first rank of each node.

MLflow's own monitor stops at the first failed request, and would write to one sqlite file from every node. So this
module calls MLflow's collectors itself and sends the readings as ordinary messages. Rank 0 puts its own into the
outbox; each other node appends its own to a file in the run's folder, which the nodes share, and rank 0 collects them
from there. Only rank 0 needs a connection to the server.

The step of a reading is the number of seconds since the start of the run: it grows over restarts and is the same on all
nodes.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dskd.console import warn
from dskd.tracking.client import first_line_without_secrets, load_mlflow
from dskd.tracking.outbox import Outbox

_FOLDER = "nodes"
_FIRST_READING_AFTER_S = 1.0  # not 0: CPU use is a mean since the previous reading
_JOIN_TIMEOUT_S = 5.0

Points = list[list[Any]]  # [name, value, time in ms, step] each


class UsageMonitor:
    """A thread that reads the use of the node it runs on until `stop` is called. Its errors end only the readings."""

    def __init__(self, node: str, started_ms: int, every_s: float, hand_over: Callable[[Points], None]) -> None:
        """Starts reading.

        Args:
            node: the name under which MLflow shows the readings: `system/NODE/…`.
            started_ms: start time of the run, in ms since the epoch.
            every_s: seconds between two readings.
            hand_over: receives the points of each reading.
        """
        self._node = node
        self._started_ms = started_ms
        self._every_s = every_s
        self._hand_over = hand_over
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_all, name="system metrics", daemon=True)
        try:
            load_mlflow()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            # Without a URI it would determine one itself. It sends nothing, because it is never started.
            self._monitor = SystemMetricsMonitor("", tracking_uri="http://localhost")
            self._monitor.collect_metrics()
        except Exception as error:
            self._warn(error)
            return
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, or abandons it if it hangs in a driver."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_TIMEOUT_S)

    def _read_all(self) -> None:
        wait_s = min(self._every_s, _FIRST_READING_AFTER_S)
        try:
            while not self._stopped.wait(wait_s):
                for collector in self._monitor.monitors:
                    collector.clear_metrics()
                self._monitor.collect_metrics()
                now = int(time.time() * 1000)
                step = max(0, now - self._started_ms) // 1000
                values = self._monitor.aggregate_metrics()
                self._hand_over([[f"system/{self._node}/{name}", float(v), now, step] for name, v in values.items()])
                wait_s = self._every_s
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        warn(
            f"{self._node}: the use of its processors and memory is no longer recorded "
            f"({first_line_without_secrets(error)})"
        )


def write_usage(folder: Path, node: str, points: Points) -> None:
    """Appends a reading to the node's file.

    Opens and closes the file each time, so that other nodes see the reading on a network file system.
    """
    file = folder / _FOLDER / f"{node}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(f"{json.dumps(points)}\n")


class UsageReader:
    """A reader of the readings of the other nodes, which remembers its position in each node's file."""

    def __init__(self, folder: Path) -> None:
        """Prepares to read from a run's folder."""
        self._folder = folder / _FOLDER
        self._offsets: dict[Path, int] = {}

    def read(self) -> Points:
        """Returns the points of all complete readings since the last call."""
        points: Points = []
        for file in sorted(self._folder.glob("*.jsonl")):
            with file.open("rb") as stream:
                stream.seek(self._offsets.get(file, 0))
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offsets[file] = self._offsets.get(file, 0) + len(whole)
            for line in whole.splitlines():
                points += json.loads(line)
        return points

    def remove(self) -> None:
        """Removes the files. Call it when nobody writes to them any more and all points are stored elsewhere."""
        for file in self._folder.glob("*.jsonl"):
            file.unlink()


def collect_usage(folder: Path, recorded: dict[str, Any] | None, outbox: Outbox) -> None:
    """Moves readings that rank 0 did not collect before it ended into the outbox of the run's folder."""
    reader = UsageReader(folder)
    points = reader.read()
    if recorded is not None and points:
        outbox.put({"run_id": recorded["run_id"], "kind": "metrics", "metrics": points})
        outbox.save()
    reader.remove()


def name_nodes(hosts: list[str]) -> list[str]:
    """Returns a name for each node: its host name, with a number if several nodes have the same one."""
    return [f"{host}-{number}" if hosts.count(host) > 1 else host for number, host in enumerate(hosts)]
