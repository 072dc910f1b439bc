"""Everything that a comparison says, put together once; text and report only lay it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dskd import evaluate
from dskd.compare.choosing import Selection, choose_runs
from dskd.compare.evaluated import (
    find_references,
    lexical_references,
    read_lexical_tables,
    read_local_measures,
    read_tables,
    require_same_data,
)
from dskd.compare.group_tests import Test, test_groups
from dskd.compare.groups import Group, config_differences, group_runs
from dskd.compare.metrics import EVALUATED, TERMS, Best, History, read_metrics
from dskd.config import Config
from dskd.errors import UserError
from dskd.examples import Examples, Measure
from dskd.tracking import EVALUATION_DATA_TAG, TrackedRun


@dataclass(frozen=True)
class Comparison:
    """Groups side by side. Values are {metric: {run id: value}}."""

    config: Config
    groups: Sequence[Group]
    baseline: Group | None
    differences: Sequence[tuple[str, Sequence[str]]]
    data: str | None  # digest of what all were evaluated on
    measures: Sequence[Measure]
    final: Mapping[str, Mapping[str, float]]
    best: Mapping[str, Mapping[str, Best]]
    histories: Mapping[str, Mapping[str, History]]
    references: Mapping[str, Mapping[str, float]]  # of models that are no runs, by name: measures
    example_tests: Sequence[Test]
    seed_tests: Sequence[Test]
    notes: Sequence[str]
    has_measures: bool = True

    @property
    def runs(self) -> list[TrackedRun]:
        """All of them, group by group."""
        return [run for group in self.groups for run in group.runs]

    def metrics(self, prefix: str) -> list[str]:
        """The metrics that begin so, of any run, in a fixed order."""
        found = [metric for metric in self.final if metric.startswith(prefix)]
        return sorted(found, key=lambda name: (TERMS.index(name) if name in TERMS else len(TERMS), name))

    def measured(self) -> list[str]:
        """The measures that any group or reference has a value of, in the order in which they are shown."""
        found = {metric.removeprefix(EVALUATED) for metric in self.metrics(EVALUATED)}
        found = found.union(*self.references.values())
        order = [measure.name for measure in evaluate.MEASURES]
        return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))

    def evaluated_in_training(self) -> list[str]:
        """Measures that were taken at several steps: only of those is there a best."""
        return [
            metric
            for metric in self.metrics(EVALUATED)
            if any(best.step for best in self.best.get(metric, {}).values())
        ]


def make_comparison(
    config: Config,
    selection: Selection | None = None,
    *,
    baseline: str | None = None,
    with_measures: bool = True,
) -> Comparison:
    """Reads the runs and compares them.

    Args:
        config: says where MLflow is, and which experiment counts.
        selection: which runs.
        baseline: the group that the others are tested against, by its name; by default the first.
        with_measures: False leaves out all that depends on the data that was evaluated on.

    Raises:
        DifferentDataError: when runs were evaluated on different data.
        UserError: when there is nothing to compare.
    """
    selection = selection or Selection()
    runs = choose_runs(config, selection) if config.tracking.enabled else []
    groups = group_runs(runs)
    local = read_local_measures(config) if with_measures else {}
    if not groups and (selection or not local):
        raise UserError(
            f"{config.workdir}: nothing to compare yet; train with `deepspeed launcher/train.py`, evaluate with "
            f"`{evaluate.MADE_BY}`, or do it all with `python launcher/pipeline.py`"
            + ("" if config.tracking.enabled else "; tracking.enabled is false, so no tracked run was looked for")
        )
    chosen = _find_baseline(groups, baseline)
    tables = read_tables(config, runs) if with_measures else {}
    data = require_same_data(runs, tables) if with_measures else None
    final, best, histories = read_metrics(config, runs, with_measures=with_measures)
    for run_id, table in tables.items():  # the evaluation itself: a metric may have been logged in training too
        for name, value in table.values().items():
            final.setdefault(f"{EVALUATED}{name}", {})[run_id] = value
    measures = _known_measures(tables, final)
    lexical, lexical_notes = read_lexical_tables(config, runs) if with_measures else ({}, [])
    of_words = _lexical_measures(lexical, final, measures)
    references = find_references(local, runs, data, selection)
    for name, values in lexical_references(config, references, lexical).items():
        references[name] = values | references[name]
    per_example, per_seed = test_groups(
        groups, chosen, [*((m, tables) for m in measures), *((m, lexical) for m in of_words)], final
    )
    return Comparison(
        config,
        groups,
        chosen,
        config_differences(groups),
        data,
        [*measures, *of_words],
        final,
        best,
        histories,
        references,
        per_example,
        per_seed,
        [*_notes(runs, tables, with_measures=with_measures), *lexical_notes],
        with_measures,
    )


def _find_baseline(groups: Sequence[Group], name: str | None) -> Group | None:
    if name is None:
        return groups[0] if groups else None
    for group in groups:
        if group.name == name:
            return group
    raise UserError(
        f"--baseline {name}: there is no such group; there are: {', '.join(g.name for g in groups) or 'none'}"
    )


def _known_measures(tables: Mapping[str, Examples], final: Mapping[str, Mapping[str, float]]) -> list[Measure]:
    """Those of the evaluation and of the tables that any run has a value of, in their order."""
    known = {measure.name: measure for measure in evaluate.MEASURES}
    for table in tables.values():
        known |= {measure.name: measure for measure in table.measures if measure.name not in known}
    return [measure for name, measure in known.items() if f"{EVALUATED}{name}" in final]


def _lexical_measures(
    tables: Mapping[str, Examples], final: dict[str, dict[str, float]], known: Sequence[Measure]
) -> list[Measure]:
    """Those that the evaluation has not; their values are added to `final`."""
    names = {measure.name for measure in known}
    found = {m.name: m for table in tables.values() for m in table.measures if m.name not in names}
    for run_id, table in tables.items():
        for name, value in table.values().items():
            if name in found:
                final.setdefault(f"{EVALUATED}{name}", {})[run_id] = value
    return [measure for name, measure in found.items() if f"{EVALUATED}{name}" in final]


def _notes(runs: Sequence[TrackedRun], tables: Mapping[str, Examples], *, with_measures: bool) -> list[str]:
    """What a reader should know before believing the numbers."""
    notes = []
    if unfinished := [f"{run.name} ({run.status.lower()})" for run in runs if run.status != "FINISHED"]:
        notes.append(f"not trained to the end: {', '.join(unfinished)}")
    evaluated = [run for run in runs if any(metric.startswith(EVALUATED) for metric in run.metrics)]
    if with_measures:
        if missing := [run.name for run in runs if run not in evaluated]:
            notes.append(f"not evaluated: {', '.join(missing)}; `dskd export` and `{evaluate.MADE_BY}` do it")
        if old := [run.name for run in evaluated if EVALUATION_DATA_TAG not in run.tags]:
            notes.append(
                f"evaluated on data of unknown hash, by an older version: {', '.join(old)}; `{evaluate.MADE_BY}` "
                "evaluates again"
            )
        elif gone := [run.name for run in evaluated if run.run_id not in tables]:
            notes.append(f"no results for each example, so in no paired test: {', '.join(gone)}")
    return notes
