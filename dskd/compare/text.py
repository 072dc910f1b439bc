"""The comparison as text for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from dskd.compare import wording
from dskd.compare.comparison import Comparison, make_comparison
from dskd.compare.group_tests import Test
from dskd.compare.metrics import COVERAGE, EVALUATED, SPEEDS, TRAINED
from dskd.compare.mlflow_link import mlflow_link
from dskd.compare.pictures import draw_curves
from dskd.config import Config
from dskd.console import table
from dskd.errors import UserError
from dskd.evaluation.held_out_text import HELD_OUT

PICTURE = "curves.png"


def format_comparison(comparison: Comparison, picture: Path | None) -> str:
    """Formats measures, tests, and a table of groups: settings that differ, training, speed, cost and coverage.

    `picture` is the file with the loss curves, or None if there is none.
    """
    parts = []
    if comparison.has_measures:
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
        parts += [f"{title}:", _measures_table(comparison, comparison.measured(title))]
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


def _measures_table(comparison: Comparison, names: Sequence[str]) -> str:
    rows = [
        [
            wording.reference_label(name),
            *(wording.number(one, values[one]) if one in values else "-" for one in names),
        ]
        for name, values in comparison.references.items()
        if any(one in values for one in names)
    ]
    for group in comparison.groups:
        values = [comparison.final.get(f"{EVALUATED}{name}", {}) for name in names]
        if any(run.run_id in found for found in values for run in group.runs):
            cells = [wording.estimate(name, group.estimate(found)) for name, found in zip(names, values, strict=True)]
            rows.append([group.label, *cells])
    return table(["model", *(wording.label(name) for name in names)], rows)


def _tests(tests: Sequence[Test]) -> str:
    header = ["group", "measure", "difference", "95 % interval", "perplexity", "p (Holm)", "", "test"]
    rows = []
    for test in tests:
        value, interval = wording.difference(test)
        rows.append(
            [
                test.group.name,
                wording.compared(test.measure),
                value,
                interval,
                wording.as_factor(test),
                wording.p_value(test.corrected_p),
                wording.verdict(test),
                f"{test.difference.test}, n = {test.difference.count:,}",
            ]
        )
    return table(header, rows, left=2)


def _groups_table(comparison: Comparison) -> str:
    groups = comparison.groups
    rows = [["status", *(wording.status(group) for group in groups)]]
    rows += [[key, *values] for key, values in comparison.differences]
    for metric in [*comparison.metrics(TRAINED), *comparison.evaluated_in_training()]:
        rows.append([metric, *(wording.estimate(metric, g.estimate(comparison.final[metric])) for g in groups)])
        if metric in comparison.best:
            found = comparison.best[metric]
            rows.append(["  best @ step", *(wording.best(metric, group, found) for group in groups)])
    for metric in [*SPEEDS, *comparison.metrics(COVERAGE)]:
        values = comparison.final.get(metric, {})
        rows.append([wording.label(metric), *(wording.estimate(metric, g.estimate(values)) for g in groups)])
    rows += [[label, *cells] for label, cells in wording.cost_rows(comparison)]
    return table(["", *(group.label for group in groups)], rows)


def compare(config: Config) -> str:
    """Returns the comparison of the newest run of each name as text; saves their curves in the work directory.

    Raises:
        DifferentDataError: when the runs were evaluated on different data.
        UserError: when nothing was trained or evaluated yet.
    """
    return summarize(make_comparison(config))


def summarize(comparison: Comparison) -> str:
    """Returns the comparison as text; saves the picture of its curves in the work directory, if that is writable."""
    if not comparison.runs:
        return format_comparison(comparison, None)
    picture = comparison.config.path(PICTURE)
    try:
        draw_curves(comparison, picture)
    except UserError as error:
        return f"{format_comparison(comparison, None)}\n\nNo picture of the loss curves: {error}"
    return format_comparison(comparison, picture)
