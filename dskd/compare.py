"""Runs side by side: what differs in their configuration, how good and how fast they are, and their curves."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dskd import evaluate
from dskd.config import Config
from dskd.errors import UserError
from dskd.text_table import table
from dskd.tracking import TrackedRun, read_history, read_runs, tracking_uri

PICTURE = "curves.png"
_CURVES = ("train/loss", "train/ce", "train/kl", "train/sense", "train/hidden")
_SMOOTHING = 0.9  # of the exponential mean drawn over the raw curve
# Settings that say where and how, and so differ without being a difference of the experiment.
_IGNORED_PARAMS = ("run", "workdir", "runs.", "tracking.")


def compare(config: Config) -> str:
    """The comparison as text; saves the picture beside it.

    Raises:
        UserError: when nothing was trained or evaluated yet.
    """
    measures = evaluate.load_measures(config)
    runs = latest_runs(read_runs(config), config.run_names) if config.tracking.enabled else []
    if not runs and not measures:
        raise UserError(
            f"{config.workdir}: nothing to compare yet; train with `deepspeed launcher/train.py`, evaluate with "
            f"`{evaluate.MADE_BY}`, or do it all with `python launcher/pipeline.py`"
        )
    parts = []
    if measures:
        parts += ["Held-out text:", measures_table(measures), ""]
    if runs:
        picture = config.path(PICTURE)
        draw_curves(config, runs, picture)
        parts += ["Runs:", runs_table(runs), "", f"Loss curves: {picture}", how_to_open(config)]
    return "\n".join(parts)


def latest_runs(runs: Sequence[TrackedRun], names: Sequence[str]) -> list[TrackedRun]:
    """The newest run of each name: first those of `names`, in that order, then any others of the experiment."""
    newest: dict[str, TrackedRun] = {}
    for run in sorted(runs, key=lambda run: run.start_time_s):
        newest[run.name] = run
    return [newest[name] for name in dict.fromkeys([*names, *newest]) if name in newest]


def measures_table(measures: Mapping[str, Mapping[str, float]]) -> str:
    """Models × measures of :mod:`dskd.evaluate`."""
    labels = {evaluate.TEACHER: "teacher", evaluate.CUT_STUDENT: "cut student, untrained"}
    header = [
        "model",
        "perplexity",
        "accuracy",
        "agrees with teacher",
        "perplexity, lexical targets",
        "sense alignment",
    ]
    rows = [
        [labels.get(name, name), *(_measure(measure, values.get(measure)) for measure in evaluate.MEASURES)]
        for name, values in measures.items()
    ]
    return table(header, rows)


def runs_table(runs: Sequence[TrackedRun]) -> str:
    """Settings that differ, final metrics and speed; a column a run."""
    rows = [["status", *(run.status.lower() for run in runs)]]
    for key in differing_params(runs):
        rows.append([key, *(run.params.get(key, "-") for run in runs)])
    for metric in (*_CURVES, "train/active_hinges", "speed/tokens_per_s", "speed/step_s"):
        values = [run.metrics.get(metric) for run in runs]
        if any(value is not None for value in values):
            rows.append([metric, *("-" if value is None else f"{value:,.4g}" for value in values)])
    return table(["", *(run.name for run in runs)], rows)


def differing_params(runs: Sequence[TrackedRun]) -> list[str]:
    """Keys of the configuration in which the runs differ."""
    keys = sorted({key for run in runs for key in run.params if not key.startswith(_IGNORED_PARAMS)})
    return [key for key in keys if len({run.params.get(key) for run in runs}) > 1]


def draw_curves(config: Config, runs: Sequence[TrackedRun], path: Path) -> None:
    """A panel for each term of the loss that any run has, a colour for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    histories = {
        metric: {run.name: read_history(config, run.run_id, metric) for run in runs if metric in run.metrics}
        for metric in _CURVES
    }
    histories = {metric: curves for metric, curves in histories.items() if any(curves.values())}
    columns = max(1, min(3, len(histories)))
    rows = max(1, math.ceil(len(histories) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False)
    colors = {run.name: f"C{number % 10}" for number, run in enumerate(runs)}
    titles = {
        "train/loss": "loss",
        "train/ce": "cross-entropy (nats)",
        "train/kl": "KL from the teacher (nats)",
        "train/sense": "sense loss",
        "train/hidden": "hidden-state distance",
    }
    for panel, (metric, curves) in zip(axes.flat, histories.items(), strict=False):
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, color=colors[name], alpha=0.25, linewidth=0.8)
            panel.plot(steps, _smoothed(values), color=colors[name], label=name, linewidth=1.6)
        panel.set_title(titles[metric])
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend()
    for panel in list(axes.flat)[len(histories) :]:
        panel.set_visible(False)
    figure.suptitle(config.tracking.experiment)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
    plt.close(figure)


def how_to_open(config: Config) -> str:
    """The command or address that shows the runs in MLflow."""
    uri = tracking_uri(config)
    if uri.startswith("http"):
        return f"MLflow: {uri}"
    program = Path(sys.executable).with_name("mlflow")  # the one beside this Python: it need not be on the PATH
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return f"MLflow: run `{shown} ui --backend-store-uri {uri}` and open http://127.0.0.1:5000"


def _measure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if "perplexity" in name else f"{value:.4f}"


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean, without the pull to 0 at its start."""
    smoothed, mean = [], 0.0
    for number, value in enumerate(values, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        smoothed.append(mean / (1 - _SMOOTHING**number))
    return smoothed
