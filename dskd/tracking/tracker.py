"""Tracking of a training in MLflow.

Rank 0 puts messages into an outbox, from which a thread sends them, so a slow server does not slow down the steps.
While the server cannot be reached, messages are kept; training continues and prints one warning. Messages that are
unsent at the end of the process stay in a file of the run's folder, and the next process that trains, exports or
evaluates the run sends them.
"""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from dskd.config import Config
from dskd.console import say, warn
from dskd.distributed.collectives import gather_json, on_main
from dskd.distributed.world import World, launcher_job
from dskd.errors import OutageError, UserError
from dskd.tracking.client import connect, first_line_without_secrets, is_refusal, tracking_uri, without_secrets
from dskd.tracking.context import write_context
from dskd.tracking.delivery import Delivery
from dskd.tracking.outbox import Outbox
from dskd.tracking.runs import create_run, find_run, load_run, run_folder, save_run
from dskd.tracking.system_metrics import Points, UsageMonitor, UsageReader, collect_usage, name_nodes, write_usage

_CONTEXT = "context"
_RETRY_AFTER_S = 5.0
_FLUSH_TIMEOUT_S = 60.0
_FLUSH_TIMEOUT_IN_HASTE_S = 15.0  # a process that received a stop signal has little time; unsent messages are on disk
_CURVES_EVERY_S = 300.0


@dataclass(frozen=True)
class Start:
    """The starting point of a training: its first step, and the run that it may resume."""

    recipe: str = ""  # digest of the run's recipe
    first_step: int = 0
    run_id: str | None = None  # recorded in the checkpoint
    device_hours: float = 0.0  # spent before, according to the checkpoint
    overwrite: bool = False


@dataclass
class NoTracker:
    """A tracker that sends nothing, for every rank but the first and for disabled tracking; it may monitor its node.

    It has the methods of :class:`MLflowTracker`.
    """

    run_id: str | None = None
    device_hours: float = 0.0
    monitor: UsageMonitor | None = field(default=None, repr=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def save_unsent(self) -> None:
        """Does nothing."""

    def finish(self, status: str) -> None:
        """Stops the monitor."""
        if self.monitor is not None:
            self.monitor.stop()


def start_tracking(
    config: Config,
    world: World,
    *,
    tags: Mapping[str, str],
    datasets: Callable[[], list[dict[str, Any]]] = list,
    curves: Mapping[str, str] | None = None,
    start: Start | None = None,
) -> "NoTracker | MLflowTracker":
    """Starts a run in MLflow, or resumes the one that was begun in this work directory. Every rank must call it.

    It resumes the run that the checkpoint names or, if there is no checkpoint yet, the run recorded in the run's
    folder, provided that it has the same recipe. If the server cannot be reached when a run is resumed, all
    messages are kept until it is back.

    Args:
        config: the experiment.
        world: the ranks.
        tags: tags of the run; those of a later start replace them.
        datasets: returns descriptions of the datasets that the run reads; called on rank 0.
        curves: {metric: title} of the curves in the picture of the losses; without any there is no picture.
        start: the starting point of the training.

    Raises:
        UserError: if there is no run to resume, and the tracking server cannot be reached (an OutageError if that may
            pass) or refuses.
    """
    start = start or Start()
    if not config.tracking.enabled:
        return NoTracker(device_hours=start.device_hours)
    trackers: list[MLflowTracker] = []

    def begin() -> int:
        trackers.append(_begin(config, tags, datasets(), curves or {}, start))
        return trackers[0].started_ms

    started_ms = on_main(begin)
    node = _own_node(world)
    is_monitored = config.tracking.system_metrics and node is not None
    folder = run_folder(config, config.run)
    if trackers:
        if is_monitored:
            trackers[0].start_monitor(str(node), config.tracking.system_metrics_every_s)
        return trackers[0]
    if not is_monitored:
        return NoTracker()
    every_s = config.tracking.system_metrics_every_s
    return NoTracker(
        monitor=UsageMonitor(str(node), started_ms, every_s, lambda points: write_usage(folder, str(node), points))
    )


class MLflowTracker:
    """The tracker of rank 0, which sends messages from a separate thread."""

    def __init__(
        self,
        config: Config,
        run_id: str,
        started_ms: int,
        outbox: Outbox,
        delivery: Delivery,
        curves: Mapping[str, str],
    ) -> None:
        self.run_id: str | None = run_id
        self.device_hours = 0.0
        self.started_ms = started_ms
        self._outbox = outbox
        self._delivery = delivery
        self._monitor: UsageMonitor | None = None
        self._reader = UsageReader(run_folder(config, config.run))
        self._curves = dict(curves)
        self._curves_at = time.monotonic()
        self._is_away = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, **message: Any) -> None:
        """Hands a message to the sending thread; returns at once."""
        self._outbox.put({"run_id": self.run_id, **message})

    def start_monitor(self, node: str, every_s: float) -> None:
        """Starts reading the use of this node, and collecting the readings of the other nodes."""

        def hand_over(points: Points) -> None:
            self.put(kind="metrics", metrics=points + self._reader.read())

        self._monitor = UsageMonitor(node, self.started_ms, every_s, hand_over)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands the metrics of one step to the sending thread; returns at once."""
        now = int(time.time() * 1000)
        self.put(kind="metrics", metrics=[[name, float(value), now, step] for name, value in metrics.items()])

    def save_unsent(self) -> None:
        """Writes unsent messages to disk: training may resume after the checkpoint and would not send them again.

        From time to time, has the sending thread redraw the picture of the losses.
        """
        if time.monotonic() - self._curves_at > _CURVES_EVERY_S and not self._is_away:
            self._curves_at = time.monotonic()
            self._put_curves()
        self._outbox.save()

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED, and waits up to a minute for unsent messages.

        Those that remain are on disk.
        """
        if self._monitor is not None:
            self._monitor.stop()
            if points := self._reader.read():
                self.put(kind="metrics", metrics=points)
        self._put_curves()
        self.put(kind="end", status=status, time_ms=int(time.time() * 1000))
        self._outbox.save()  # before waiting: whoever sent a stop signal may kill this process soon
        has_time = status == "FINISHED" and not self._is_away
        self._outbox.wait_until_empty(_FLUSH_TIMEOUT_S if has_time else _FLUSH_TIMEOUT_IN_HASTE_S)
        self._ending.set()
        if len(self._outbox):
            warn(
                f"MLflow cannot be reached: {len(self._outbox)} messages about run {self.run_id} are kept in "
                f"{self._outbox.file}; training, exporting or evaluating the run again sends them"
            )
        else:
            self._outbox.save()

    def _put_curves(self) -> None:
        if self._curves:
            self.put(kind="curves", titles=self._curves)

    def _send_all(self) -> None:
        while not self._ending.is_set():
            batch = self._outbox.next_batch()
            if not batch:
                self._outbox.wait_for_messages(_RETRY_AFTER_S)
                continue
            try:
                self._delivery.deliver(batch)
            except Exception as error:  # mlflow raises its own, sqlalchemy's and requests' errors
                if not self._is_away:
                    warn(
                        f"MLflow cannot be reached ({first_line_without_secrets(error)}); training continues and keeps "
                        "its messages"
                    )
                    self._is_away = True
                self._ending.wait(_RETRY_AFTER_S)
                continue
            if self._is_away:
                say("MLflow can be reached again; sending the messages that were kept")
                self._is_away = False
            self._outbox.drop(len(batch))


Tracker = NoTracker | MLflowTracker


def _begin(
    config: Config, tags: Mapping[str, str], datasets: list[dict[str, Any]], curves: Mapping[str, str], start: Start
) -> MLflowTracker:
    """Returns rank 0's tracker for a run that it creates or resumes."""
    folder = run_folder(config, config.run)
    outbox, delivery = Outbox(folder), Delivery(config, config.run)
    recorded = load_run(folder)
    collect_usage(folder, recorded, outbox)
    recorded_id = recorded["run_id"] if recorded and recorded["recipe"] == start.recipe else None
    resumable = [] if start.overwrite else [run_id for run_id in (start.run_id, recorded_id) if run_id is not None]
    run, device_hours = None, start.device_hours
    # Resume the first of these runs that MLflow still has, or create a run.
    try:
        client = delivery.client = connect(config)
        run = next((known for run_id in resumable if (known := find_run(client, run_id)) is not None), None)
        if run is None:
            resumable = []
            run = create_run(client, config, {**tags, **{f"job.{name}": text for name, text in launcher_job().items()}})
        else:
            # MLflow's number includes the hours of steps trained after the checkpoint, which were spent too.
            device_hours = max(device_hours, run.data.metrics.get("cost/device_hours", 0.0))
        run_id, started_ms = run.info.run_id, run.info.start_time
    except Exception as error:  # mlflow raises its own, sqlalchemy's and requests' errors
        if not resumable:
            if isinstance(error, UserError):
                raise
            # A server that is restarting, or a database that is locked, may work at the next attempt.
            raise (UserError if is_refusal(error) else OutageError)(
                f"tracking.uri: MLflow at {without_secrets(tracking_uri(config))} cannot be used "
                f"({first_line_without_secrets(error)}); start its server, correct the URI, or set "
                "tracking.enabled=false"
            ) from error
        # No server, but a run to resume: take its id from the records and keep all messages.
        run_id = resumable[0]
        is_recorded = recorded is not None and recorded["run_id"] == run_id
        started_ms = recorded["started_ms"] if recorded and is_recorded else int(time.time() * 1000)
    save_run(folder, run_id, start.recipe, started_ms)
    tracker = MLflowTracker(config, run_id, started_ms, outbox, delivery, curves)
    tracker.device_hours = device_hours
    if resumable:
        # The run's `job.` tags name the job of the first start, so the restart message names this one.
        job = {**launcher_job(), "world_size": tags.get("world_size", "?")}
        on = ", ".join(f"{name} {text}" for name, text in job.items())
        at = datetime.now().astimezone().isoformat(" ", "milliseconds")
        tracker.put(kind="restart", step=start.first_step, on=on, at=at, tags=dict(tags))
    tracker.put(kind="deaths")  # after all earlier messages about those runs
    if datasets:
        tracker.put(kind="datasets", datasets=datasets)
    for file in _write_context(config, folder):
        tracker.put(kind="file", file=str(file.relative_to(config.path())), folder=None)
    outbox.save()
    return tracker


def _write_context(config: Config, folder: Path) -> list[Path]:
    # Kept in the run's folder because the server may be unreachable for long.
    context = folder / _CONTEXT
    shutil.rmtree(context, ignore_errors=True)
    context.mkdir(parents=True)
    return write_context(config, context)


def _own_node(world: World) -> str | None:
    """Returns the name of this rank's node on the first rank of each node, None on others. Every rank must call it."""
    ranks = gather_json({"host": socket.gethostname(), "first": world.local_rank == 0})
    first = [rank for rank, one in enumerate(ranks) if one["first"]]
    names = dict(zip(first, name_nodes([ranks[rank]["host"] for rank in first]), strict=True))
    return names.get(world.rank)
