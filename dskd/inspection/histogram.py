"""Histograms of counts, as text and as a picture."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure

from dskd.artifacts.files import save_figure

_BAR_WIDTH = 40
_MOST_SINGLE_VALUES = 16

Histogram = list[tuple[str, int]]  # (the values of a bin, their number), ascending


def log2_histogram(values: torch.Tensor) -> Histogram:
    """Counts non-negative integers in the bins 0, 1, 2-3, 4-7, …, up to the last that is not empty."""
    # The exponent from frexp is exact: 0 for 0, and e for 2^(e-1) … 2^e - 1.
    exponents = torch.frexp(values.double()).exponent
    bins = []
    for exponent, count in enumerate(torch.bincount(exponents.long()).tolist()):
        low, high = (2 ** (exponent - 1), 2**exponent - 1) if exponent else (0, 0)
        bins.append((f"{low:,}" if low == high else f"{low:,}-{high:,}", count))
    return bins


def histogram(values: torch.Tensor) -> Histogram:
    """Counts non-negative integers by value if all are small, and otherwise in the bins of :func:`log2_histogram`."""
    if len(values) and int(values.max()) > _MOST_SINGLE_VALUES:
        return log2_histogram(values)
    return [(f"{value}", count) for value, count in enumerate(torch.bincount(values).tolist())]


def histogram_text(bins: Histogram) -> str:
    """Formats one line with a bar per bin; the fullest bin has the longest bar."""
    most = max((count for _, count in bins), default=0)
    labels = max((len(label) for label, _ in bins), default=0)
    numbers = max((len(f"{count:,}") for _, count in bins), default=0)
    lines = []
    for label, count in bins:
        length = max(1, round(_BAR_WIDTH * count / most)) if count else 0  # a bin that is not empty has a bar
        lines.append(f"  {label:>{labels}}  {count:>{numbers},}  {'█' * length}".rstrip())
    return "\n".join(lines)


def draw_histograms(histograms: Mapping[str, Histogram], path: Path) -> None:
    """Draws the histograms side by side into one PNG."""
    figure = Figure(figsize=(6.4 * len(histograms), 4.2))
    axes = figure.subplots(1, len(histograms), squeeze=False)
    for panel, (title, bins) in zip(axes.flat, histograms.items(), strict=True):
        bars = panel.bar([label for label, _ in bins], [count for _, count in bins], color="#4477aa", width=0.85)
        panel.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
        panel.set_title(title)
        panel.set_ylabel("tokens")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.1)
    figure.tight_layout()
    save_figure(figure, path)
