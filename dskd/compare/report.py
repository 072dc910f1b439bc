"""The comparison as one HTML file that needs only a browser: no network, no script.

The template escapes the names that users chose (groups, settings, experiments). It inserts only the pictures unescaped,
and in these matplotlib has escaped all text. The page's own policy forbids loading or running anything.
"""

import datetime
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dskd.artifacts.files import write_text
from dskd.compare import wording
from dskd.compare.comparison import Comparison
from dskd.compare.group_tests import Test
from dskd.compare.groups import INPUT_TAGS, Group
from dskd.compare.metrics import COVERAGE, EVALUATED, SPEEDS, TRAINED
from dskd.compare.mlflow_link import mlflow_link
from dskd.compare.pictures import bars_svg, color_of, curves_svg, differences_svg, slug
from dskd.errors import UserError
from dskd.tracking import git_commit

TEMPLATE = "report.html.jinja"
_PACKAGES = ("dskd", "mlflow", "matplotlib", "scipy")
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    cells: Sequence[str]
    kind: str = ""  # `reference` and `sub` rows are less prominent
    color: str = ""  # colour of the row's group
    verdict: str = ""  # for a row of a test: the style of its last cell


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the report; on failure, an existing file at `path` stays as it is.

    Raises:
        UserError: when the file cannot be written.
    """
    text = render_report(comparison)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--html {path}: cannot write there ({error.strerror}); name a file you may write") from None


def require_writable(path: Path) -> None:
    """Checks that the report can be written to `path`; called before anything is read.

    Raises:
        UserError: when `path` is a folder, or its folder is not writable.
    """
    if not path.name or path.is_dir():
        raise UserError(f"--html {str(path)!r}: that is a folder; name a file, such as {path / 'report.html'}")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UserError(f"--html {path}: cannot write there ({error.strerror}); name a file you may write") from None


def render_report(comparison: Comparison) -> str:
    """Returns the report as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    groups = comparison.groups
    experiments = list(dict.fromkeys(run.experiment for run in comparison.runs))
    title = f"Comparison: {', '.join(experiments) or comparison.config.tracking.experiment}"
    return template.render(
        title=title,
        version=metadata.version("dskd"),
        lead=_lead(comparison),
        facts=_facts(comparison),
        link=mlflow_link(comparison.config, comparison.runs) if comparison.runs else None,
        warnings=[f"{note[0].upper()}{note[1:]}." for note in comparison.notes],
        measured=[
            {"title": t, "id": slug(t), "table": _measures(comparison, t), "bars": bars_svg(comparison, t)}
            for t in comparison.titles
        ],
        references_note=_references_note(comparison),
        baseline=comparison.baseline.name if comparison.baseline else "",
        tests=_tests(comparison),
        differences=_grid(
            ["setting", *(g.label for g in groups)], [Row([key, *v]) for key, v in comparison.differences]
        ),
        colors=[color_of(number) for number in range(len(groups))],
        curves=curves_svg(comparison),
        training=_training(comparison),
        resources=_resources(comparison),
        runs=_runs(comparison),
        notes=[f"{note[0].upper()}{note[1:]}." for note in wording.method_notes(comparison)],
        footer=_footer(),
    )


def _grid(header: Sequence[str], rows: Sequence[Row]) -> dict[str, Any] | None:
    return {"header": header, "rows": rows} if rows else None


def _lead(comparison: Comparison) -> str:
    groups, runs = len(comparison.groups), len(comparison.runs)
    text = f"{groups} group{'s' * (groups != 1)} of settings, {runs} run{'s' * (runs != 1)}"
    if not comparison.has_measures:
        return f"{text}; settings, speed and cost only"
    better = [test for test in comparison.example_tests if test.is_better]
    if comparison.example_tests and comparison.baseline:
        return (
            f"{text}; {len(better)} of {len(comparison.example_tests)} differences to {comparison.baseline.name} are "
            "improvements by the corrected test on examples"
        )
    return text


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = [("made", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")]
    for results in comparison.results:
        if results.data:
            facts.append((f"{results.evaluation.name} of", results.data))
    if comparison.baseline and len(comparison.groups) > 1:
        facts.append(("baseline", comparison.baseline.name))
    for tag in INPUT_TAGS:
        digests = {run.tags[tag] for run in comparison.runs if tag in run.tags}
        if len(digests) == 1:
            facts.append((tag.replace("_", " "), digests.pop()))
    return facts


def _measures(comparison: Comparison, title: str) -> dict[str, Any] | None:
    names = comparison.measured(title)
    rows = [
        Row(
            [wording.reference_label(name), "", *(wording.number(m, v[m]) if m in v else "-" for m in names)],
            "reference",
        )
        for name, v in comparison.references.items()
    ]
    for number, group in enumerate(comparison.groups):
        cells = [
            wording.estimate(name, group.estimate(comparison.final.get(f"{EVALUATED}{name}", {}))) for name in names
        ]
        rows.append(Row([group.name, str(len(group.runs)), *cells], color=color_of(number)))
    return _grid(["model", "seeds", *(wording.label(name) for name in names)], rows) if names else None


def _references_note(comparison: Comparison) -> str:
    lines = [
        text
        for name, text in (
            ("teacher", "dashed: the teacher"),
            ("student", "dotted: the student as it was cut, untrained"),
        )
        if name in comparison.references
    ]
    return f"Grey lines, where they fit in: {'; '.join(lines)}." if lines and comparison.groups else ""


def _tests(comparison: Comparison) -> list[dict[str, Any]]:
    kinds = [
        (
            comparison.example_tests,
            "examples",
            "Example by example",
            "Would these very models differ on other text of this kind? How much another seed would change is not in "
            "these intervals.",
        ),
        (
            comparison.seed_tests,
            "seeds",
            "Seed by seed",
            "Would other trainings of the same settings differ? Few seeds make wide intervals.",
        ),
    ]
    header = ["group", "measure", "difference", "95 % interval", "perplexity", "p", "p (Holm)", "test", "n", "verdict"]
    return [
        {
            "title": title,
            "text": text,
            "svg": differences_svg(tests, comparison, f"differences-{name}"),
            "header": header,
            "rows": [_test_row(test, comparison) for test in tests],
        }
        for tests, name, title, text in kinds
        if tests
    ]


def _test_row(test: Test, comparison: Comparison) -> Row:
    value, interval = wording.difference(test)
    cells = [
        test.group.name,
        wording.compared(test.measure),
        value,
        interval,
        wording.as_factor(test),
        wording.p_value(test.difference.p_value),
        wording.p_value(test.corrected_p),
        test.difference.test,
        f"{test.difference.count:,}",
        wording.verdict(test),
    ]
    color = color_of(list(comparison.groups).index(test.group))
    return Row(cells, color=color, verdict={True: "better", False: "worse", None: "unclear"}[test.is_better])


def _training(comparison: Comparison) -> dict[str, Any] | None:
    rows = []
    for metric in [*comparison.metrics(TRAINED), *comparison.evaluated_in_training()]:
        cells = [wording.estimate(metric, group.estimate(comparison.final[metric])) for group in comparison.groups]
        rows.append(Row([wording.label(metric), *cells]))
        if metric in comparison.best:
            found = comparison.best[metric]
            rows.append(
                Row(["best @ step", *(wording.best(metric, group, found) for group in comparison.groups)], "sub")
            )
    return _grid(["last step", *(group.label for group in comparison.groups)], rows)


def _resources(comparison: Comparison) -> dict[str, Any] | None:
    groups = comparison.groups
    if not groups:
        return None
    rows = []
    for metric in [*SPEEDS, *comparison.metrics(COVERAGE)]:
        values = comparison.final.get(metric, {})
        rows.append(
            Row([wording.label(metric), *(wording.estimate(metric, group.estimate(values)) for group in groups)])
        )
    rows += [Row([label, *cells]) for label, cells in wording.cost_rows(comparison)]
    return _grid(["", *(group.label for group in groups)], rows)


def _runs(comparison: Comparison) -> dict[str, Any] | None:
    header = ["run", "group", "seed", "status", "started (UTC)", "ranks", "id in MLflow", "evaluated on", "commit"]
    return _grid(
        header,
        [
            Row(_run_cells(run, group), color=color_of(number))
            for number, group in enumerate(comparison.groups)
            for run in group.runs
        ],
    )


def _run_cells(run: Any, group: Group) -> list[str]:
    started = datetime.datetime.fromtimestamp(run.start_time_s, datetime.UTC)
    ranks = f"{run.tags.get('world_size', '-')} {run.tags.get('device', '')}".strip()
    return [
        run.name,
        group.name,
        run.params.get("seed", "-"),
        run.status.lower(),
        f"{started:%Y-%m-%d %H:%M}",
        ranks,
        run.run_id,
        run.tags.get("evaluation_data", "-")[:_SHOWN_DIGITS],
        run.tags.get("git_commit", "-")[:_SHOWN_DIGITS],
    ]


def _footer() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
    commit = git_commit()
    return f"Made by `dskd compare` with Python {platform.python_version()}, {', '.join(versions)}" + (
        f"; commit {commit}" if commit else ""
    )
