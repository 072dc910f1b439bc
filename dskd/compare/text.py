"""The comparison as text for a terminal."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from dskd.compare import tables, wording
from dskd.compare.comparison import Comparison, make_comparison
from dskd.compare.continuations import Continuations
from dskd.compare.group_tests import Test
from dskd.compare.mlflow_link import mlflow_link
from dskd.compare.pictures import draw_curves
from dskd.compare.statistics import INTERVAL
from dskd.config import Config
from dskd.console import table
from dskd.errors import UserError
from dskd.evaluation.evaluations import HELD_OUT

PICTURE = "curves.png"
_WIDTH = 110  # characters of a line of text


def format_comparison(comparison: Comparison, picture: Path | None) -> str:
    """Formats measures, tests, and a table of groups: settings that differ, training, speed, cost and coverage.

    `picture` is the file with the loss curves, or None if there is none.
    """
    parts = []
    if comparison.results:
        parts += _measures(comparison)
    if comparison.groups:
        parts += ["Runs:", _groups_table(comparison), ""]
    notes = [*comparison.notes, *wording.method_notes(comparison)]
    if notes:
        parts += ["Notes:", *(f"- {note}" for note in notes), ""]
    if picture is not None:
        parts.append(f"Loss curves: {picture}")
    if comparison.runs:
        parts.append(str(mlflow_link(comparison.config, comparison.runs)))
    return "\n".join(parts).rstrip()


def _measures(comparison: Comparison) -> list[str]:
    parts = []
    for title in comparison.titles:
        parts += [f"{title}:", _measures_of(comparison, title)]
        parts += [
            f"{'evaluated' if results.evaluation is HELD_OUT else results.evaluation.name} on {results.data}"
            for results in comparison.results
            if results.evaluation.title == title and results.data
        ]
        parts.append("")
    if comparison.example_tests and comparison.baseline:
        parts += [
            f"Differences to {comparison.baseline.name}, example by example:",
            _tests(comparison.example_tests),
            "",
        ]
    if comparison.seed_tests and comparison.baseline:
        parts += [f"Differences to {comparison.baseline.name}, seed by seed:", _tests(comparison.seed_tests), ""]
    return parts


def _measures_of(comparison: Comparison, title: str) -> str:
    built = tables.measures_table(comparison, title)
    rows = [
        [row.group.label if row.group else row.cells[0], *row.cells[2:]]  # the label has the number of seeds
        for row in built.rows
        if any(cell != "-" for cell in row.cells[2:])
    ]
    return table([built.header[0], *built.header[2:]], rows)


def _tests(tests: Sequence[Test]) -> str:
    rows = []
    for row in tables.tests_table(tests).rows:
        group, measure, difference, interval, factor, _, corrected_p, test, count, verdict = row.cells
        rows.append([group, measure, difference, interval, factor, corrected_p, verdict, f"{test}, n = {count}"])
    header = ["group", "measure", "difference", INTERVAL, "perplexity", "p (Holm)", "", "test"]
    return table(header, rows, left=2)


def _groups_table(comparison: Comparison) -> str:
    rows = [["status", *(wording.status(group) for group in comparison.groups)]]
    for built in (
        tables.settings_table(comparison),
        tables.training_table(comparison, str),
        tables.resources_table(comparison),
    ):
        for row in built.rows:
            rows.append([f"  {row.cells[0]}" if row.kind == "sub" else row.cells[0], *row.cells[1:]])
    return table(["", *(group.label for group in comparison.groups)], rows)


def format_texts(texts: Sequence[Continuations]) -> str:
    """Formats prompts with the continuations of all models, one below the other."""
    lines = ["The same prompts, continued by each model (the most probable token at each step):"]
    for text in texts:
        rows = wording.rows_of_continuations(text)
        width = max(len(name) for name, _ in rows)
        lines += ["", textwrap.fill(text.prompt, _WIDTH)]
        for name, continuation in rows:
            begin = f"  {name.ljust(width)}  "
            lines.append(textwrap.fill(continuation, _WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin)))
    return "\n".join(lines)


def compare(config: Config, *, with_texts: bool = False) -> str:
    """Returns the comparison of the newest run of each name as text; saves their curves in the work directory.

    `with_texts` also shows what the models say. Raises the errors of
    :func:`dskd.compare.comparison.make_comparison`.
    """
    return summarize(make_comparison(config), with_texts=with_texts)


def summarize(comparison: Comparison, *, with_texts: bool = False) -> str:
    """Returns the comparison as text; saves the picture of its curves in the work directory, if that is writable.

    `with_texts` also shows what the models say.
    """
    if with_texts and comparison.texts:
        return f"{summarize(comparison)}\n\n{format_texts(comparison.texts)}"
    if not comparison.runs:
        return format_comparison(comparison, None)
    picture = comparison.config.path(PICTURE)
    try:
        draw_curves(comparison, picture)
    except UserError as error:
        return f"{format_comparison(comparison, None)}\n\nNo picture of the loss curves: {error}"
    return format_comparison(comparison, picture)
