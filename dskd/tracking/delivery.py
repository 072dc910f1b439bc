"""Delivery of messages (:mod:`dskd.tracking.outbox`) to MLflow, by one thread of one process at a time.

| kind | content |
|---|---|
| `metrics` | `metrics`: a list of [name, value, time in ms, step] |
| `measures` | `measures`: {name: value}, at `step`; the same metric may be sent more than once |
| `restart` | the run resumes: from `step`, `on` which job and ranks, `at` which time, with which `tags` |
| `deaths` | all other runs with this name and work directory that MLflow shows as RUNNING have died |
| `end` | the run ended with `status`, at `time_ms` |
| `file` | upload `file` of the work directory to `folder` of the run's artifacts |
| `table` | the same for a table that `mlflow.load_table` can read |
| `curves` | draw the picture of the losses: `titles`, {metric: title} |
| `datasets` | the datasets that the run reads |
| `tags` | `tags` of the run |
| `model` | the exported model in `folder` of the work directory |

Delivering a message twice has the same effect as once. A point is not sent if its step is not after the last step that
MLflow has for its metric: when a run trains some steps again, with the same results, the step axis never goes back.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dskd.config import Config
from dskd.console import warn
from dskd.tracking.client import connect, first_line_without_secrets, is_refusal
from dskd.tracking.datasets import log_datasets
from dskd.tracking.outbox import Message
from dskd.tracking.registered_model import log_model
from dskd.tracking.runs import fail_dead_runs, load_run, note_restart, refresh_parent, run_folder

CURVES_FILE = "loss.png"


class Delivery:
    """The connection of one process to MLflow, with the last step of each metric of a run."""

    def __init__(self, config: Config, run: str) -> None:
        """Prepares deliveries for the run named `run` of the config; does not connect yet."""
        self._config = config
        self._run = run
        self._last_steps: dict[str, dict[str, int]] = {}
        self.client: Any = None

    def deliver(self, messages: Iterable[Message]) -> None:
        """Sends messages of one kind and run to MLflow; prints a warning if MLflow refuses them.

        Raises errors of mlflow, sqlalchemy or requests if a later attempt may succeed.
        """
        first, *more = messages
        try:
            if self.client is None:
                self.client = connect(self._config)
            self._deliver(first, more)
        except Exception as error:
            # A message that MLflow will never accept must not block the messages after it.
            if not is_refusal(error):
                raise
            warn(
                f"MLflow refused {first['kind']} of run {first['run_id']} "
                f"({first_line_without_secrets(error)}); the message is dropped"
            )

    def _deliver(self, first: Message, more: list[Message]) -> None:
        run_id, kind = first["run_id"], first["kind"]
        if kind == "metrics":
            self._send_metrics(run_id, [point for message in (first, *more) for point in message["metrics"]])
        elif kind == "measures":
            for name, value in first["measures"].items():
                self.client.log_metric(run_id, name, value, step=first["step"])
        elif kind == "restart":
            note_restart(self.client, run_id, first)
        elif kind == "deaths":
            recorded = load_run(run_folder(self._config, self._run))
            if recorded is not None and recorded["run_id"] == run_id:  # otherwise a later run has started since
                fail_dead_runs(self.client, self._config, self._run, keep=run_id)
        elif kind == "end":
            self.client.set_terminated(run_id, first["status"], first["time_ms"])
            refresh_parent(self.client, run_id)
        elif kind == "tags":
            for name, text in first["tags"].items():
                self.client.set_tag(run_id, name, text)
        elif kind == "datasets":
            log_datasets(self.client, run_id, first["datasets"])
        elif kind == "curves":
            self._send_curves(run_id, first.get("titles", {}))
        elif kind == "model":
            log_model(self.client, self._config, run_id, self._config.path(first["folder"]))
        elif kind in ("file", "table"):
            self._send_file(run_id, self._config.path(first["file"]), first["folder"], is_table=kind == "table")
        else:  # written by a later version
            raise ValueError(f"{self._config.workdir}: a message for MLflow is of unknown kind {kind!r}")

    def last_steps(self, run_id: str) -> dict[str, int]:
        """Returns {metric: the last step that MLflow has of it}."""
        if run_id not in self._last_steps:
            # Only the newest point of each metric: a whole history could have millions.
            points = self.client.get_run(run_id).data._metric_objs
            self._last_steps[run_id] = {point.key: point.step for point in points}
        return self._last_steps[run_id]

    def _send_metrics(self, run_id: str, points: list[list[Any]]) -> None:
        from mlflow.entities import Metric

        last = self.last_steps(run_id)
        new, reached = [], dict(last)
        for name, value, time_ms, step in points:
            if step > reached.get(name, -1):
                new.append(Metric(name, value, time_ms, step))
                reached[name] = step
        for start in range(0, len(new), 1000):  # the maximum per request
            self.client.log_batch(run_id, metrics=new[start : start + 1000])
        self._last_steps[run_id] = reached

    def _send_file(self, run_id: str, file: Path, folder: str | None, *, is_table: bool) -> None:
        if not file.is_file():  # removed together with an older run
            return
        self.client.log_artifact(run_id, str(file), folder)
        if is_table:
            # Does the same as `client.log_table`, but without adding the rows to those of an earlier evaluation.
            path = f"{folder}/{file.name}" if folder else file.name
            logged = json.loads(self.client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
            if (entry := {"path": path, "type": "table"}) not in logged:
                self.client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*logged, entry]))

    def _send_curves(self, run_id: str, titles: Mapping[str, str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / CURVES_FILE
            if draw_curves(self.client, run_id, titles, picture):
                self.client.log_artifact(run_id, str(picture))


def draw_curves(client: Any, run_id: str, titles: Mapping[str, str], path: Path) -> bool:
    """Draws a panel for each metric in `titles` that the run has, over all of its restarts.

    Reads the points from MLflow, because this process knows only those since the last restart.

    Returns:
        False if the run has no such metric; then no picture is written.
    """
    # Not pyplot, whose state is global: this runs in a thread during training.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = client.get_run(run_id)
    names = [name for name in titles if name in run.data.metrics]
    if not names:
        return False
    figure = Figure(figsize=(4.2 * len(names), 3.4))
    for number, name in enumerate(names, start=1):
        points = sorted({point.step: point.value for point in client.get_metric_history(run_id, name)}.items())
        panel = figure.add_subplot(1, len(names), number)
        panel.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) == 1 else None)
        panel.set_title(titles[name])
        panel.set_xlabel("step")
        panel.locator_params(nbins=4)  # most of the time goes into the numbers next to the axes
        panel.grid(alpha=0.3)
    figure.suptitle(run.info.run_name)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(str(path))
    return True
