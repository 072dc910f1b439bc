"""The picture of the report: the difference of each arm to a baseline, with its interval."""

from collections.abc import Mapping
from pathlib import Path

from dskd.compare.statistics import Difference

Differences = Mapping[str, Difference]


def draw_differences(panels: Mapping[tuple[str, str], Differences], path: Path) -> None:
    """Draws an SVG file with a panel for each (measure, baseline) that has differences.

    Equal differences give an identical file. If there are no differences, the file is removed.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = {names: differences for names, differences in panels.items() if differences}
    if not panels:
        path.unlink(missing_ok=True)
        return
    rows = max(len(differences) for differences in panels.values())
    figure = Figure(figsize=(4.6 * len(panels), 1.2 + 0.32 * rows))
    for number, ((measure, baseline), differences) in enumerate(panels.items(), start=1):
        panel = figure.add_subplot(1, len(panels), number)
        for row, (name, found) in enumerate(reversed(differences.items())):
            panel.plot([found.low, found.high], [row, row], color="tab:blue", linewidth=1.5)
            panel.plot(found.value, row, "o", color="tab:blue", markersize=5)
            panel.annotate(
                name,
                (0, row),
                xycoords=("axes fraction", "data"),
                xytext=(-6, 0),
                ha="right",
                va="center",
                textcoords="offset points",
                fontsize=9,
            )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks([])
        panel.set_ylim(-0.7, len(differences) - 0.3)
        panel.set_title(f"{measure.replace('_', ' ')} against {baseline}\n(left is better)", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "differences", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})
