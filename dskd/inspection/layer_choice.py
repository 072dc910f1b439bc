"""`dskd student --explain`: what each layer of the teacher does to its states, and which layers each spacing keeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from matplotlib.figure import Figure

from dskd.artifacts.files import save_figure
from dskd.config import Config, Spacing, StudentConfig
from dskd.console import table
from dskd.errors import UserError, counted
from dskd.models.files.folder import find_teacher
from dskd.students.measuring import measure_importance
from dskd.students.spacing import Importance, as_text, choose_layers, num_removed_layers

LIST = "your list"  # the config's, if student.layers is one
_KEPT, _BAR, _FAINT = "#4477aa", "#ee6677", "#e3e7eb"


def explain_layers(config: Config) -> str:
    """Measures the teacher's layers, draws a picture, and returns a text with a table and the picture's path.

    Nothing is cut. If `student.layers` is a list, the other spacings keep as many layers.

    Raises:
        UserError: when there is no teacher or no text, or the student keeps all layers, or is not cut.
    """
    student = config.student
    if student.origin != "cut":
        raise UserError(
            f"--explain: student.{student.origin} names a whole model, so no layers are chosen; remove --explain or "
            f"student.{student.origin}"
        )
    teacher = find_teacher(config)
    count = teacher.load_config().num_hidden_layers
    if student.num_layers == count:
        raise UserError(
            f"--explain: student.layers keeps all of the teacher's {count} layers, so nothing would be removed; set "
            f"student.layers to {count - 1} or less"
        )
    size = num_removed_layers(student, count)
    importance = measure_importance(config, teacher, size)
    choices = choices_of(student, importance)
    path = config.path("plots", "layers.png")
    draw_layers(importance, choices, path)
    return f"{format_layers(student, importance, choices)}\n\nPicture: {path}"


def choices_of(student: StudentConfig, importance: Importance) -> dict[str, list[int]]:
    """Returns {spacing: the layers that it keeps}, all with the number of layers that the config keeps."""
    count = len(importance.layers)
    number = student.model_copy(update={"layers": student.num_layers})
    choices = {
        spacing: choose_layers(number.model_copy(update={"spacing": spacing}), count, importance)
        for spacing in get_args(Spacing)
    }
    return choices | ({LIST: choose_layers(student, count)} if isinstance(student.layers, tuple) else {})


def format_layers(student: StudentConfig, importance: Importance, choices: Mapping[str, Sequence[int]]) -> str:
    """Returns the table of layers and choices, and sentences on what is measured and what the config chooses."""
    count, size, last = len(importance.layers), importance.block_size, student.last_layers
    rows = [
        [
            str(layer),
            f"{importance.layers[layer]:.4f}",
            f"{importance.blocks[layer]:.4f}" if layer < len(importance.blocks) else "",
            *("kept" if layer in kept else "-" for kept in choices.values()),
        ]
        for layer in range(count)
    ]
    removed = [_removed(kept, importance) for kept in choices.values()]
    rows.append(["all removed", "", "", *("" if angle is None else f"{angle:.4f}" for angle in removed)])
    chosen = LIST if isinstance(student.layers, tuple) else student.spacing
    best = min(range(len(importance.blocks)), key=lambda layer: importance.blocks[layer])
    block = f"layer {best} changes" if size == 1 else f"layers {best} to {best + size - 1} change"
    stays = "layer stays" if last == 1 else f"{last} layers stay"
    return "\n".join(
        [
            table(("layer", "angle", f"next {size}", *choices), rows),
            "",
            "Angles are those between the states that enter and leave layers, in half turns: means over "
            f"{importance.tokens:,} tokens of {importance.samples:,} training sequences.",
            f"Of all blocks of {counted(size, 'layer')}, {block} the states least: {importance.blocks[best]:.4f}."
            + (f" With ends and importance, the teacher's last {stays} (student.train_layers)." if last else ""),
            f"This config chooses {chosen}: the teacher's layers {as_text(choices[chosen])}.",
        ]
    )


def _removed(kept: Sequence[int], importance: Importance) -> float | None:
    """Returns the angle of what a choice removes, or None if that is not one block, and so was not measured."""
    removed = [layer for layer in range(len(importance.layers)) if layer not in kept]
    is_block = removed == list(range(removed[0], removed[0] + len(removed)))
    return importance.blocks[removed[0]] if is_block else None


def draw_layers(importance: Importance, choices: Mapping[str, Sequence[int]], path: Path) -> None:
    """Draws the angles, and under them the layers that each spacing keeps, into one PNG."""
    count, size = len(importance.layers), importance.block_size
    figure = Figure(figsize=(max(6.4, 0.28 * count + 1.6), 5.2))
    angles, layers = figure.subplots(2, 1, sharex=True, height_ratios=(3, 0.35 * len(choices) + 0.4))
    angles.bar(range(count), importance.layers, color=_BAR, width=0.8, label="the layer alone")
    # At the middle of a block, so that a point is drawn above the layers that it is about.
    middles = [start + (size - 1) / 2 for start in range(len(importance.blocks))]
    if size > 1:
        angles.plot(
            middles, importance.blocks, color=_KEPT, marker="o", markersize=3, label=f"{size} layers, at their middle"
        )
    angles.set_ylabel("angle between the states that\nenter and leave, in half turns")
    angles.set_ylim(bottom=0)
    angles.legend(frameon=False, fontsize=8)
    angles.grid(axis="y", alpha=0.25)
    for row, kept in enumerate(choices.values()):
        colors = [_KEPT if layer in kept else _FAINT for layer in range(count)]
        layers.barh([row] * count, [0.9] * count, left=[layer - 0.45 for layer in range(count)], color=colors)
    layers.set_yticks(range(len(choices)), list(choices))
    layers.invert_yaxis()
    layers.set_xlabel("layer of the teacher (blue: kept)")
    layers.set_xlim(-0.7, count - 0.3)
    layers.xaxis.get_major_locator().set_params(integer=True)
    for panel in (angles, layers):
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)
