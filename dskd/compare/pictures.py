"""Pictures of a comparison: loss curves, measures as bars with intervals, and differences to the baseline."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dskd.artifacts.files import save_figure
from dskd.compare import wording
from dskd.compare.comparison import Comparison
from dskd.compare.group_tests import Test
from dskd.compare.metrics import CURVES, EVALUATED, History
from dskd.evaluation.models import TEACHER, UNTRAINED_STUDENT

_SMOOTHING = 0.9  # decay of the exponential mean that is drawn over the raw curve
_PIXELS_AN_INCH = 93  # on a screen; with it, three panels fill the page
_PANEL_INCHES = 4.0  # width
_LONGEST_LABEL = 24  # characters
_POINTS = 400  # largest number of points drawn for a curve, which is more than a panel has pixels
# After Paul Tol's "bright" palette: distinct to colour-blind readers, and dark enough on white. Further groups use the
# same colours with other dashes.
_COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#b8860b", "#2f9fbf", "#777777")
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_ARROWS = {True: "← better", False: "better →", None: ""}
_INK, _FAINT = "#1d2733", "#8a949e"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#aab2ba",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#4a5560",
    "ytick.color": "#4a5560",
    "legend.frameon": False,
    "figure.dpi": 100,
}


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draws the loss curves into the PNG file `path`."""
    with matplotlib.rc_context(_STYLE):
        save_figure(_curves(comparison), path)


def slug(title: str) -> str:
    """Returns a title in the form of an HTML id."""
    return title.lower().replace(" ", "-")


def curves_svg(comparison: Comparison) -> str | None:
    """Draws the loss curves as SVG for an HTML page; returns None if there are no curves."""
    return _svg(lambda: _curves(comparison), "curves") if _drawn_curves(comparison) else None


def bars_svg(comparison: Comparison, title: str) -> str | None:
    """Draws bars as SVG: a panel for each measure of the results with this title, with a bar for each group.

    Returns None if no run has such a measure.
    """
    metrics = [name for name in comparison.measured(title) if f"{EVALUATED}{name}" in comparison.final]
    return _svg(lambda: _bars(comparison, metrics), f"bars-{slug(title)}") if metrics else None


def differences_svg(tests: Sequence[Test], comparison: Comparison, name: str) -> str | None:
    """Draws differences as SVG: a panel for each measure, with every group's difference to the baseline and interval.

    Returns None if no test has a finite interval.
    """
    drawn = [test for test in tests if math.isfinite(test.difference.low)]
    return _svg(lambda: _differences(drawn, comparison), name) if drawn else None


def _curves(comparison: Comparison) -> Figure:
    metrics = _drawn_curves(comparison)
    figure, axes = _panels(len(metrics), height=3.0)
    for panel, metric in zip(axes, metrics, strict=False):
        for number, group in enumerate(comparison.groups):
            curves = [comparison.histories[metric].get(run.run_id, ()) for run in group.runs]
            curves = [points for points in curves if points]
            if not curves:
                continue
            color, dash = paint(number)
            # Thin lines: the raw curve of a single run, or the smoothed curve of each of several. Bold: their mean.
            smoothed = [_smoothed(points) for points in curves]
            for raw, smooth in zip(curves, smoothed, strict=True):
                thin = smooth if len(curves) > 1 else raw
                panel.plot(*_thinned(thin), color=color, alpha=0.28, linewidth=0.8)
            panel.plot(*_thinned(_mean_curve(smoothed)), color=color, linestyle=dash, linewidth=1.8)
        panel.set_title(wording.label(metric), parse_math=False)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    _legend(figure, comparison)
    return figure


def _bars(comparison: Comparison, metrics: Sequence[str]) -> Figure:
    groups = comparison.groups
    figure, axes = _panels(len(metrics), height=0.75 + 0.42 * len(groups), share_y=True)
    for panel, metric in zip(axes, metrics, strict=False):
        values = comparison.final.get(f"{EVALUATED}{metric}", {})
        # A bar for each group's mean, its interval, and a dot for each seed; `right` is where the longest bar ends.
        right = 0.0
        of_groups = [(number, group, group.estimate(values)) for number, group in enumerate(groups)]
        drawn = [(n, group, each) for n, group, each in of_groups if each is not None and math.isfinite(each.mean)]
        for number, group, estimate in drawn:
            half = estimate.half_width or 0.0
            panel.barh(number, estimate.mean, color=paint(number)[0], height=0.62)
            if estimate.half_width is not None:
                panel.errorbar(estimate.mean, number, xerr=half, color=_INK, capsize=3.5, linewidth=1.2)
                seeds = [values[run.run_id] for run in group.runs if run.run_id in values]
                panel.plot(seeds, [number] * len(seeds), "o", color="white", markeredgecolor=_INK, markersize=3.6)
            right = max(right, estimate.mean + half)
        # The values in words, once `right` is known, because their distance to the bars depends on it.
        for number, _, estimate in drawn:
            panel.text(
                estimate.mean + (estimate.half_width or 0.0) + 0.035 * right,
                number,
                wording.estimate(metric, estimate),
                va="center",
                fontsize=8.5,
                parse_math=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )
        # Lines for the teacher and the untrained student, unless they are so far off that the bars would shrink.
        references = {n: v[metric] for n, v in comparison.references.items() if metric in v}
        panel.set_yticks(range(len(groups)), [_short(group.label) for group in groups], parse_math=False)
        panel.set_ylim(len(groups) - 0.5, -0.5)
        limit = 1.45 * right if right > 0 else 1.0
        for name, style in ((TEACHER, "dashed"), (UNTRAINED_STUDENT, "dotted")):
            if references.get(name) is not None and references[name] <= limit:
                panel.axvline(references[name], color=_FAINT, linestyle=style, linewidth=1.2)
        panel.set_xlim(0, limit)
        better = next((m.lower_is_better for of in comparison.results for m in of.measures if m.name == metric), None)
        panel.set_title(f"{wording.label(metric)} {_ARROWS[better]}", parse_math=False)
        panel.tick_params(axis="y", length=0)
    return figure


def _differences(tests: Sequence[Test], comparison: Comparison) -> Figure:
    names = list(dict.fromkeys(test.measure.name for test in tests))
    groups = [group for group in comparison.groups if any(test.group is group for test in tests)]
    figure, axes = _panels(len(names), height=1.1 + 0.4 * len(groups), share_y=True)
    for panel, name in zip(axes, names, strict=False):
        of_measure = [test for test in tests if test.measure.name == name]
        measure = of_measure[0].measure
        scale = 1.0 if measure.is_exponential else 100.0
        panel.axvline(0, color=_INK, linewidth=1.0)
        for test in of_measure:
            difference, row = test.difference, groups.index(test.group)
            color = paint(comparison.groups.index(test.group))[0]
            low, high = (scale * (bound - difference.value) for bound in (difference.low, difference.high))
            # A hollow marker: the test shows no difference.
            panel.errorbar(
                scale * difference.value,
                row,
                xerr=[[-low], [high]],
                fmt="o",
                color=color,
                markerfacecolor=color if test.is_better is not None else "white",
                capsize=4,
                linewidth=1.8,
                markersize=7,
            )
        panel.set_yticks(range(len(groups)), [_short(group.name) for group in groups], parse_math=False)
        panel.set_ylim(len(groups) - 0.5, -0.5)
        panel.margins(x=0.12)
        panel.set_title(wording.label(measure.name), parse_math=False)
        panel.set_xlabel(f"{wording.unit(measure)}, {_ARROWS[measure.lower_is_better]}", fontsize=9)
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(axis="y", length=0)
    return figure


def _drawn_curves(comparison: Comparison) -> list[str]:
    return [metric for metric in CURVES if any(comparison.histories.get(metric, {}).values())]


def paint(number: int) -> tuple[str, str]:
    """Returns the colour and the dashes of the group with index `number` in the comparison."""
    return _COLORS[number % len(_COLORS)], _DASHES[number // len(_COLORS) % len(_DASHES)]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"


def _panels(count: int, *, height: float, share_y: bool = False) -> tuple[Figure, list[Any]]:
    columns = max(1, min(3, count))
    rows = max(1, math.ceil(count / columns))
    size = (_PANEL_INCHES * columns, height * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    for panel in axes.flat[count:]:
        panel.set_visible(False)
    return figure, list(axes.flat)


def _legend(figure: Figure, comparison: Comparison) -> None:
    handles = [
        Line2D([], [], color=color, linestyle=dash, linewidth=1.8, label=_short(group.label))
        for group, (color, dash) in zip(comparison.groups, map(paint, range(len(comparison.groups))), strict=True)
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _mean_curve(curves: Sequence[History]) -> list[tuple[int, float]]:
    """Returns the mean over runs, at the steps that all runs have; a single curve is returned as it is."""
    if len(curves) == 1:
        return list(curves[0])
    by_step = [dict(points) for points in curves]
    steps = sorted(set.intersection(*(set(points) for points in by_step)))
    return [(step, float(np.mean([points[step] for points in by_step]))) for step in steps]


def _smoothed(points: History) -> list[tuple[int, float]]:
    """Returns the exponential mean of a curve, corrected for its bias to 0 at the start."""
    smoothed, mean = [], 0.0
    for number, (step, value) in enumerate(points, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        smoothed.append((step, mean / (1 - _SMOOTHING**number)))
    return smoothed


def _thinned(points: History) -> tuple[list[int], list[float]]:
    """Returns the steps and values of at most `_POINTS` points, evenly spread over the curve, including the last."""
    if not points:
        return [], []
    kept = sorted({round(index) for index in np.linspace(0, len(points) - 1, min(len(points), _POINTS))})
    return [points[index][0] for index in kept], [points[index][1] for index in kept]


def _svg(draw: Callable[[], Figure], name: str) -> str:
    """Returns a figure as an `<svg>` element with unique ids and no references to anything outside of it."""
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = draw()
        buffer = io.StringIO()
        no_metadata: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration and the document type
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    # The width as drawn, in pixels; the page makes it narrower if there is less room.
    width, _ = figure.get_size_inches() * _PIXELS_AN_INCH
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 style="width: {width:.0f}px">', text, count=1)
