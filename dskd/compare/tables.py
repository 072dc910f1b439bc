"""The tables of a comparison, each built once: the text prints them in a terminal, the report as HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dskd.compare import wording
from dskd.compare.comparison import Comparison
from dskd.compare.group_tests import Test
from dskd.compare.groups import Group
from dskd.compare.metrics import COVERAGE, EVALUATED, SPEEDS, TRAINED
from dskd.compare.statistics import INTERVAL


@dataclass(frozen=True)
class Row:
    """A row of a table. Its first cell is its label."""

    cells: Sequence[str]
    kind: str = ""  # `reference` and `sub` rows are less prominent
    group: Group | None = None  # the group of runs that the row is about
    verdict: str = ""  # of a test: `better`, `worse` or `not shown`


@dataclass(frozen=True)
class Table:
    """A header and rows with as many cells."""

    header: Sequence[str]
    rows: Sequence[Row]


def measures_table(comparison: Comparison, title: str) -> Table:
    """Returns the measures of the evaluations with this title, a row for each reference and each group of runs.

    The second column is the number of seeds.
    """
    names = comparison.measured(title)
    rows = [
        Row(
            [wording.reference_label(name), "", *(wording.number(m, values[m]) if m in values else "-" for m in names)],
            "reference",
        )
        for name, values in comparison.references.items()
    ]
    for group in comparison.groups:
        estimates = [group.estimate(comparison.final.get(f"{EVALUATED}{name}", {})) for name in names]
        cells = [wording.estimate(name, estimate) for name, estimate in zip(names, estimates, strict=True)]
        rows.append(Row([group.name, str(len(group.runs)), *cells], group=group))
    return Table(["model", "seeds", *(wording.label(name) for name in names)], rows)


def tests_table(tests: Sequence[Test]) -> Table:
    """Returns the tests of groups against the baseline."""
    header = ["group", "measure", "difference", INTERVAL, "perplexity", "p", "p (Holm)", "test", "n", "verdict"]
    rows = [
        Row(
            [
                test.group.name,
                wording.compared(test.measure),
                *wording.difference(test),
                wording.as_factor(test),
                wording.p_value(test.difference.p_value),
                wording.p_value(test.corrected_p),
                test.difference.test,
                f"{test.difference.count:,}",
                wording.verdict(test),
            ],
            group=test.group,
            verdict=wording.verdict(test),
        )
        for test in tests
    ]
    return Table(header, rows)


def settings_table(comparison: Comparison) -> Table:
    """Returns the settings in which the groups differ, with a column for each group."""
    rows = [Row([key, *values]) for key, values in comparison.differences]
    return Table(["setting", *_labels(comparison)], rows)


def training_table(comparison: Comparison, name_of: Callable[[str], str]) -> Table:
    """Returns the last value of every metric of training, and the best one if there is a best."""
    rows = []
    for metric in [*comparison.metrics(TRAINED), *comparison.evaluated_in_training()]:
        rows.append(_metric_row(comparison, name_of(metric), metric))
        if metric in comparison.best:
            best = comparison.best[metric]
            rows.append(Row(["best @ step", *(wording.best(metric, g, best) for g in comparison.groups)], "sub"))
    return Table(["last step", *_labels(comparison)], rows)


def resources_table(comparison: Comparison) -> Table:
    """Returns speed, coverage and cost."""
    metrics = [*SPEEDS, *comparison.metrics(COVERAGE)]
    rows = [_metric_row(comparison, wording.label(metric), metric) for metric in metrics]
    rows += [Row([label, *cells]) for label, cells in wording.cost_rows(comparison)]
    return Table(["", *_labels(comparison)], rows)


def _metric_row(comparison: Comparison, label: str, metric: str) -> Row:
    values = comparison.final.get(metric, {})
    return Row([label, *(wording.estimate(metric, group.estimate(values)) for group in comparison.groups)])


def _labels(comparison: Comparison) -> list[str]:
    return [group.label for group in comparison.groups]
