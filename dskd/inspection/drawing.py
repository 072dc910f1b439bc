"""Drawing the picture of :mod:`dskd.inspection.plot` with matplotlib."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from dskd.artifacts.files import DPI, save_figure
from dskd.inspection.labels import place_labels

_AREAS = {"word": (60.0, 420.0), "synonym": (22.0, 150.0), "antonym": (22.0, 150.0)}  # points², fewest to most states
_LABEL_SIZES = {"word": 13, "synonym": 8, "antonym": 8}
_MARKERS = {"word": "o", "synonym": "o", "antonym": "v"}
_FAR = 30.0  # a label more pixels than this away from its point gets a line to it


def draw_picture(picture: "Picture", path: Path) -> int:
    """Writes the picture, and returns the number of labels left out for lack of room."""
    figure = Figure(figsize=(10.5, 7.5), dpi=DPI)
    axes = figure.subplots()
    colors = [f"C{index % 10}" for index in range(len(picture.words))]
    for entry in sorted(picture.entries, key=lambda entry: entry.kind == "word"):  # the words on top
        points, areas = picture.points[entry.points], _areas(picture, entry)
        axes.scatter(*points.T, s=areas, marker=_MARKERS[entry.kind], **_paint(entry, colors[entry.of_word]))
    axes.margins(0.1)
    axes.set_title(picture.title, fontsize=14)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.spines[:].set_color("#bbbbbb")
    _add_legend(axes, picture, colors)
    figure.tight_layout()
    unlabelled = _add_labels(figure, axes, picture, colors)
    save_figure(figure, path)
    return unlabelled


def _paint(entry: "DrawnEntry", color: str) -> dict[str, Any]:
    if entry.kind == "word":
        return {"color": color, "edgecolors": "black", "linewidths": 0.9, "alpha": 0.9}
    if entry.kind == "synonym":
        return {"color": color, "edgecolors": "none", "alpha": 0.35}
    return {"facecolors": "white", "edgecolors": color, "linewidths": 1.1, "alpha": 0.8}


def _areas(picture: "Picture", entry: "DrawnEntry") -> np.ndarray:
    """Returns the marker area of each sense, which grows linearly with the number of states that it was made from.

    Senses of given words share one scale, and those of their synonyms and antonyms another.
    """
    alike = [e for e in picture.entries if (e.kind == "word") == (entry.kind == "word")]
    most = max(picture.counts[e.points].max() for e in alike)
    low, high = _AREAS[entry.kind]
    return low + (high - low) * picture.counts[entry.points] / most


def _radii(areas: np.ndarray) -> np.ndarray:
    """Returns the radii in pixels of markers with these areas in points²."""
    return np.sqrt(areas / np.pi) * DPI / 72


def _add_legend(axes: Any, picture: "Picture", colors: list[str]) -> None:
    def handle(label: str, **options: Any) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **options)

    handles = [
        handle(word, marker="o", markersize=9, color=color, markeredgecolor="black")
        for word, color in zip(picture.words, colors, strict=True)
    ]
    kinds = {entry.kind for entry in picture.entries}
    if "synonym" in kinds:
        handles.append(handle("a synonym's sense", marker="o", markersize=6, color="0.6"))
    if "antonym" in kinds:
        handles.append(handle("an antonym's sense", marker="v", markersize=6, color="white", markeredgecolor="0.3"))
    # Below the picture, because inside it the legend would cover points.
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=min(6, len(handles)),
        frameon=False,
        title="area: number of states of a sense",
        title_fontsize=9,
    )


def _add_labels(figure: Any, axes: Any, picture: "Picture", colors: list[str]) -> int:
    """Writes each entry's word next to its largest sense, and returns the number of labels left out for lack of room.

    The given words get their places first, then the other entries, those with most states first.
    """
    order = sorted(picture.entries, key=lambda e: (e.kind != "word", -int(picture.counts[e.points].sum())))
    renderer = FigureCanvasAgg(figure).get_renderer()
    to_pixels = axes.transData.transform
    anchors, radii, sizes, texts = [], [], [], []
    # Draw every label once to learn its size in pixels.
    for entry in order:
        largest = entry.points.start + int(picture.counts[entry.points].argmax())
        area = _areas(picture, entry)[largest - entry.points.start]
        text = axes.text(
            *picture.points[largest],
            entry.text,
            fontsize=_LABEL_SIZES[entry.kind],
            fontweight="bold" if entry.kind == "word" else "normal",
            fontstyle="italic" if entry.kind == "antonym" else "normal",
            color=colors[entry.of_word] if entry.kind == "word" else "0.15",
            ha="center",
            va="center",
            parse_math=False,
            path_effects=[withStroke(linewidth=2, foreground="white", alpha=0.8)],
        )
        box = text.get_window_extent(renderer)
        anchors.append(to_pixels(picture.points[largest]))
        radii.append(_radii(area))
        sizes.append((box.width + 4, box.height))
        texts.append(text)
    # Find places for the labels that cover no other label and few points.
    obstacle_radii = np.empty(len(picture.points))
    for entry in picture.entries:
        obstacle_radii[entry.points] = _radii(_areas(picture, entry))
    centres = place_labels(
        np.array(anchors),
        np.array(radii),
        np.array(sizes),
        to_pixels(picture.points),
        obstacle_radii,
        axes.get_window_extent(renderer).extents.tolist(),
    )
    # Move the labels there, remove those without a place, and connect distant ones with their points.
    for text, anchor, size, centre in zip(texts, anchors, sizes, centres, strict=True):
        if centre is None:
            text.remove()
            continue
        text.set_position(axes.transData.inverted().transform(centre))
        edge = np.clip(anchor, np.array(centre) - np.array(size) / 2, np.array(centre) + np.array(size) / 2)
        if np.hypot(*(edge - anchor)) > _FAR:
            ends = axes.transData.inverted().transform(np.array([anchor, edge]))
            axes.plot(*ends.T, color="0.6", linewidth=0.6, zorder=1)
    return sum(centre is None for centre in centres)


@dataclass(frozen=True)
class DrawnEntry:
    """An entry of the picture: a given word, or a synonym or antonym of one."""

    text: str
    of_word: int  # the index of the given word
    kind: str  # "word", "synonym" or "antonym"
    points: slice  # the points of the picture that are its senses


@dataclass(frozen=True)
class Picture:
    """The contents of the picture: P points, each a sense."""

    words: tuple[str, ...]
    entries: tuple[DrawnEntry, ...]
    points: np.ndarray  # [P, 2]
    counts: np.ndarray  # [P], states that each sense was made from
    title: str
