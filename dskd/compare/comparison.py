"""The complete content of a comparison, computed once; text and report only lay it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dskd.artifacts import kinds
from dskd.compare.choosing import Chosen, Selection, choose_runs
from dskd.compare.continuations import Continuations, read_continuations
from dskd.compare.group_tests import Test, test_groups
from dskd.compare.groups import Group, config_differences, group_runs
from dskd.compare.metrics import CURVES, EVALUATED, Best, History, read_metrics
from dskd.compare.results import Results, read_results
from dskd.config import Config
from dskd.errors import UserError
from dskd.evaluation.evaluations import HELD_OUT
from dskd.evaluation.scores_by_example import Examples, Measure
from dskd.tracking import TrackedRun


@dataclass(frozen=True)
class Comparison:
    """The groups of runs and their results. `final`, `best` and `histories` are {metric: {run id: value}}."""

    config: Config
    groups: Sequence[Group]
    baseline: Group | None
    differences: Sequence[tuple[str, Sequence[str]]]
    results: Sequence[Results]  # one for each evaluation that is not left out
    final: Mapping[str, Mapping[str, float]]
    best: Mapping[str, Mapping[str, Best]]
    histories: Mapping[str, Mapping[str, History]]
    example_tests: Sequence[Test]
    seed_tests: Sequence[Test]
    notes: Sequence[str]
    texts: Sequence[Continuations]  # what the models say, if the evaluation on held-out text is not left out

    @property
    def runs(self) -> list[TrackedRun]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    def metrics(self, prefix: str) -> list[str]:
        """Returns the metrics of any run that begin with `prefix`, in a fixed order."""
        metrics = [metric for metric in self.final if metric.startswith(prefix)]
        return sorted(metrics, key=lambda name: (CURVES.index(name) if name in CURVES else len(CURVES), name))

    @property
    def references(self) -> dict[str, dict[str, float]]:
        """Measures of models that are not tracked runs: {model: {measure: value}}."""
        merged: dict[str, dict[str, float]] = {}
        for results in self.results:
            for name, values in results.references.items():
                merged[name] = dict(values) | merged.get(name, {})
        return merged

    def measured(self, title: str | None = None) -> list[str]:
        """Returns the measures for which any group or reference has a value, in the order in which they are shown.

        With a `title`, returns only those of the evaluations with this title.
        """
        # {measure: whether it has this title}; a measure of two evaluations belongs to the first.
        names: dict[str, bool] = {}
        for results in self.results:
            has_title = title is None or results.evaluation.title == title
            of_references = [name for values in results.references.values() for name in values]
            for name in [*(measure.name for measure in results.measures), *of_references]:
                names.setdefault(name, has_title)
        shown = {name for values in self.references.values() for name in values}
        shown |= {metric.removeprefix(EVALUATED) for metric in self.metrics(EVALUATED)}
        return [name for name, has_title in names.items() if has_title and name in shown]

    @property
    def titles(self) -> list[str]:
        """Titles of the evaluations that have measures, each once."""
        return list(
            dict.fromkeys(
                results.evaluation.title for results in self.results if self.measured(results.evaluation.title)
            )
        )

    def evaluated_in_training(self) -> list[str]:
        """Returns the measures that were logged at several steps; only these have a best value."""
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
    without: Sequence[str] = (),
) -> Comparison:
    """Reads the runs of the config's address of MLflow and experiment, or those of the selection, and compares them.

    `baseline` is the name of the group that the others are tested against, by default the first; `without` has the
    names of evaluations to leave out.

    Raises:
        DifferentDataError: when runs were evaluated on different data.
        UserError: when there is nothing to compare.
    """
    selection = selection or Selection()
    chosen = choose_runs(config, selection) if config.tracking.enabled else Chosen([])
    groups, notes = group_runs(chosen.runs)
    runs = [run for group in groups for run in group.runs]
    results = read_results(config, runs, selection, without=without)
    if not groups and (selection or not any(evaluated.references for evaluated in results)):
        raise UserError(
            f"{config.workdir}: nothing to compare yet; train with `{kinds.CHECKPOINT.made_by}`, evaluate with "
            f"`{kinds.EVALUATION.made_by}`, or do it all with `python launcher/pipeline.py --config FILE`"
            + ("" if config.tracking.enabled else "; tracked runs are not compared, because tracking.enabled is false")
        )
    base = _find_baseline(groups, baseline)
    final, best, histories = read_metrics(config, runs, with_measures=HELD_OUT.name not in without)
    # Values computed from the results' tables are shown. A measure that could not be compared is removed, even if the
    # tracking server has values of it.
    measures: dict[str, tuple[Measure, Mapping[str, Examples]]] = {}
    for evaluated in results:
        in_tables = {measure.name for table in evaluated.tables.values() for measure in table.measures}
        for name in in_tables - {measure.name for measure in evaluated.measures} - measures.keys():
            final.pop(f"{EVALUATED}{name}", None)
        for measure in evaluated.measures:
            if measure.name in measures:  # the evaluation on held-out text comes first and takes precedence
                continue
            measures[measure.name] = measure, evaluated.tables
            # The tables replace the logged values: training may have logged a metric of the same name.
            for run_id, table in evaluated.tables.items():
                values = table.values()
                if measure.name in values:
                    final.setdefault(f"{EVALUATED}{measure.name}", {})[run_id] = values[measure.name]
    with_values = [measure for name, measure in measures.items() if f"{EVALUATED}{name}" in final]
    per_example, per_seed = test_groups(groups, base, with_values, final)
    held_out = next((evaluated for evaluated in results if evaluated.evaluation is HELD_OUT), None)
    texts = [] if held_out is None else read_continuations(config, runs, list(held_out.references))
    return Comparison(
        config,
        groups,
        base,
        config_differences(groups),
        results,
        final,
        best,
        histories,
        per_example,
        per_seed,
        [*chosen.notes, *notes, *_notes(runs, results), *(note for evaluated in results for note in evaluated.notes)],
        texts,
    )


def _find_baseline(groups: Sequence[Group], name: str | None) -> Group | None:
    if name is None:
        return groups[0] if groups else None
    for group in groups:
        if group.name == name:
            return group
    raise UserError(
        f"--baseline {name}: there is no such group; the groups are: {', '.join(g.name for g in groups) or 'none'}"
    )


def _notes(runs: Sequence[TrackedRun], results: Sequence[Results]) -> list[str]:
    """Returns notes that a reader should know before trusting the numbers."""
    notes = []
    if unfinished := [f"{run.name} ({run.status.lower()})" for run in runs if run.status != "FINISHED"]:
        notes.append(f"not trained to the end: {', '.join(unfinished)}")
    tables = next((evaluated.tables for evaluated in results if evaluated.evaluation is HELD_OUT), None)
    evaluated = [run for run in runs if any(metric.startswith(EVALUATED) for metric in run.metrics)]
    if tables is not None:
        if missing := [run.name for run in runs if run not in evaluated]:
            notes.append(f"not evaluated: {', '.join(missing)}; `dskd export` and `{HELD_OUT.made_by}` evaluate them")
        if old := [run.name for run in evaluated if HELD_OUT.tag not in run.tags]:
            notes.append(
                f"evaluated by an older version, which did not record the data's hash: {', '.join(old)}; "
                f"`{HELD_OUT.made_by}` evaluates them again"
            )
        elif gone := [run.name for run in evaluated if run.run_id not in tables]:
            notes.append(f"in no test on examples, because their scores of each example are missing: {', '.join(gone)}")
    return notes
