"""The comparison as one HTML file that needs only a browser: no network, no script.

The template escapes the names that users chose (groups, settings, experiments). It inserts only the pictures unescaped,
and in these matplotlib has escaped all text. The page's own policy forbids loading or running anything.
"""

import datetime
import platform
import tempfile
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dskd.artifacts.files import write_text
from dskd.compare import tables, wording
from dskd.compare.comparison import Comparison
from dskd.compare.groups import INPUT_TAGS, SHOWN_DIGITS
from dskd.compare.mlflow_link import mlflow_link
from dskd.compare.pictures import bars_svg, curves_svg, differences_svg, paint, slug
from dskd.compare.statistics import INTERVAL
from dskd.compare.tables import Row, Table
from dskd.errors import UserError, counted
from dskd.evaluation.models import LABELS, TEACHER, UNTRAINED_STUDENT
from dskd.tracking import git_commit

TEMPLATE = "report.html.jinja"
_PACKAGES = ("dskd", "mlflow", "matplotlib", "scipy")


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the report; an existing file at `path` stays as it is if that is impossible (UserError)."""
    text = render_report(comparison)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--html {path}: cannot write there ({error.strerror}); name a file you may write") from None


def require_writable(path: Path) -> None:
    """Raises a UserError if the report cannot be written to `path`; called before anything is read."""
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
    return template.render(
        title=f"Comparison: {', '.join(experiments) or comparison.config.tracking.experiment}",
        version=metadata.version("dskd"),
        interval=INTERVAL,
        lead=_lead(comparison),
        facts=_facts(comparison),
        link=mlflow_link(comparison.config, comparison.runs) if comparison.runs else None,
        warnings=[f"{note[0].upper()}{note[1:]}." for note in comparison.notes],
        measured=[
            {
                "title": t,
                "id": slug(t),
                "table": _grid(comparison, tables.measures_table(comparison, t)),
                "bars": bars_svg(comparison, t),
            }
            for t in comparison.titles
        ],
        references_note=_references_note(comparison),
        texts=[(text.prompt, wording.rows_of_continuations(text)) for text in comparison.texts],
        baseline=comparison.baseline.name if comparison.baseline else "",
        tests=_tests(comparison),
        differences=_grid(comparison, tables.settings_table(comparison)),
        colors=[paint(number)[0] for number in range(len(groups))],
        curves=curves_svg(comparison),
        training=_grid(comparison, tables.training_table(comparison, wording.label)),
        resources=_grid(comparison, tables.resources_table(comparison)) if groups else None,
        runs=_grid(comparison, _runs(comparison)),
        notes=[f"{note[0].upper()}{note[1:]}." for note in wording.method_notes(comparison)],
        footer=_footer(),
    )


def _grid(comparison: Comparison, table: Table) -> dict[str, Any] | None:
    """Returns what the template shows of a table; None if it has no rows."""
    colors = {id(group): paint(number)[0] for number, group in enumerate(comparison.groups)}
    rows = [
        {"cells": row.cells, "kind": row.kind, "verdict": row.verdict, "color": colors.get(id(row.group), "")}
        for row in table.rows
    ]
    return {"header": table.header, "rows": rows} if rows else None


def _lead(comparison: Comparison) -> str:
    groups, runs = len(comparison.groups), len(comparison.runs)
    text = f"{counted(groups, 'group')} of settings, {counted(runs, 'run')}"
    if not comparison.results:
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


def _references_note(comparison: Comparison) -> str:
    lines = [
        text
        for name, text in (
            (TEACHER, f"dashed: the {LABELS[TEACHER]}"),
            (UNTRAINED_STUDENT, f"dotted: the {LABELS[UNTRAINED_STUDENT]}"),
        )
        if name in comparison.references
    ]
    return f"Grey lines, if they fit into the panel: {'; '.join(lines)}." if lines and comparison.groups else ""


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
    return [
        {
            "title": title,
            "text": text,
            "svg": differences_svg(tests, comparison, f"differences-{name}"),
            "table": _grid(comparison, tables.tests_table(tests)),
        }
        for tests, name, title, text in kinds
        if tests
    ]


def _runs(comparison: Comparison) -> Table:
    header = ["run", "group", "seed", "status", "started (UTC)", "ranks", "id in MLflow", "evaluated on", "commit"]
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            cells = [
                run.name,
                group.name,
                run.params.get("seed", "-"),
                run.status.lower(),
                f"{datetime.datetime.fromtimestamp(run.start_time_s, datetime.UTC):%Y-%m-%d %H:%M}",
                f"{run.tags.get('world_size', '-')} {run.tags.get('device', '')}".strip(),
                run.run_id,
                run.tags.get("evaluation_data", "-")[:SHOWN_DIGITS],
                run.tags.get("git_commit", "-")[:SHOWN_DIGITS],
            ]
            rows.append(Row(cells, group=group))
    return Table(header, rows)


def _footer() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
    commit = git_commit()
    return f"Made by `dskd compare` with Python {platform.python_version()}, {', '.join(versions)}" + (
        f"; commit {commit}" if commit else ""
    )
