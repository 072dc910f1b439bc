"""The picture of a run's loss and its terms that lies with the run in MLflow."""

from pathlib import Path
from typing import Any

_PANELS = {
    "train/loss": "loss",
    "train/ce": "cross-entropy (nats)",
    "train/kl": "divergence from the teacher (nats)",
    "train/sense": "sense loss",
    "train/hidden": "hidden-state distance",
}


def draw_curves(client: Any, run_id: str, path: Path) -> bool:
    """A panel for each term of the loss that the run has, over all of its restarts; False when it has none.

    The points are MLflow's: this process knows only those since the last restart.
    """
    # Not pyplot, whose state is the process's: this runs in a thread beside the training.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = client.get_run(run_id)
    names = [name for name in _PANELS if name in run.data.metrics]
    if not names:
        return False
    figure = Figure(figsize=(4.2 * len(names), 3.4))
    for number, name in enumerate(names, start=1):
        points = sorted({point.step: point.value for point in client.get_metric_history(run_id, name)}.items())
        panel = figure.add_subplot(1, len(names), number)
        panel.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) == 1 else None)
        panel.set_title(_PANELS[name])
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.suptitle(run.info.run_name)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(str(path))
    return True
