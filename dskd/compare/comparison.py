"""Everything that a comparison says, put together once; text and report only lay it out.

What was evaluated on different data is refused here: a perplexity on other text is another number, whatever it says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dskd import evaluate
from dskd.compare.choosing import Selection, choose_runs
from dskd.compare.groups import Group, config_differences, group_runs
from dskd.compare.statistics import Difference, holm, on_seeds, paired_on_examples
from dskd.config import Config
from dskd.errors import UserError, listed
from dskd.examples import Examples, Measure, read_examples
from dskd.manifest import read_manifest
from dskd.tracking import (
    EVALUATION_DATA_TAG,
    EVALUATION_FOLDER,
    TrackedRun,
    read_artifact,
    read_histories,
)

EVALUATED, TRAINED = "eval/", "train/"
SPEEDS = ("speed/tokens_per_s", "speed/step_s")
COST = "cost/device_hours"
COVERAGE = "coverage/"
# Metrics of training that are no terms of the loss: smaller is not better, and nobody reads their last value.
_NOT_LOSSES = ("train/grad_norm", "train/learning_rate", "train/active_hinges")
_TERMS = ("train/loss", "train/ce", "train/kl", "train/sense", "train/hidden")  # these first, in this order
_DIVERGED = 1e30  # and beyond, where servers write infinity as their largest number; NaN is not below it either
History = Sequence[tuple[int, float]]


class DifferentDataError(UserError):
    """What was chosen was evaluated on different data."""


@dataclass(frozen=True)
class Best:
    """The best value of a run's metric, and its step."""

    value: float
    step: int


@dataclass(frozen=True)
class Test:
    """A group against the baseline in one measure."""

    group: Group
    measure: Measure
    difference: Difference
    corrected_p: float  # by Holm, over the tests of its kind in this comparison

    @property
    def is_better(self) -> bool | None:
        """True where the group is better than the baseline, False where it is worse, None where that is not shown."""
        if not self.corrected_p < 0.05:
            return None
        return (self.difference.value < 0) == self.measure.lower_is_better


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
        return sorted(found, key=lambda name: (_TERMS.index(name) if name in _TERMS else len(_TERMS), name))

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
    local = _local_measures(config) if with_measures else {}
    if not groups and (selection or not local):
        raise UserError(
            f"{config.workdir}: nothing to compare yet; train with `deepspeed launcher/train.py`, evaluate with "
            f"`{evaluate.MADE_BY}`, or do it all with `python launcher/pipeline.py`"
            + ("" if config.tracking.enabled else "; tracking.enabled is false, so no tracked run was looked for")
        )
    chosen = _find_baseline(groups, baseline)
    tables = _read_tables(config, runs) if with_measures else {}
    data = _require_same_data(runs, tables) if with_measures else None
    final, best, histories = _read_metrics(config, runs, with_measures=with_measures)
    measures = _known_measures(tables, final)
    per_example, per_seed = _test_groups(groups, chosen, measures, tables, final)
    return Comparison(
        config,
        groups,
        chosen,
        config_differences(groups),
        data,
        measures,
        final,
        best,
        histories,
        _references(local, runs, data, selection),
        per_example,
        per_seed,
        _notes(runs, tables, with_measures=with_measures),
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


def _read_tables(config: Config, runs: Sequence[TrackedRun]) -> dict[str, Examples]:
    """{run id: what each example scored}, of the runs that have it."""
    tables = {}
    for run in runs:
        if EVALUATION_DATA_TAG not in run.tags:
            continue
        path = f"{EVALUATION_FOLDER}/{evaluate.EXAMPLES_FILE}"
        content = read_artifact(config, run.run_id, path)
        if content is not None:
            try:
                tables[run.run_id] = read_examples(content)
            except ValueError as error:
                raise UserError(
                    f"artifact {path} of run {run.name} ({run.run_id}): {error}; evaluate it again with "
                    f"`{evaluate.MADE_BY}`"
                ) from None
    return tables


def _require_same_data(runs: Sequence[TrackedRun], tables: Mapping[str, Examples]) -> str | None:
    """The digest of what all of these runs were evaluated on; None where none was."""
    by_digest: dict[str, list[str]] = {}
    for run in runs:
        digests = {run.tags.get(EVALUATION_DATA_TAG)}
        if run.run_id in tables:
            digests.add(tables[run.run_id].data)
        for digest in digests - {None}:
            by_digest.setdefault(str(digest), []).append(f"{run.name} ({run.run_id[:8]})")
    return _only_one(by_digest)


def _only_one(by_digest: Mapping[str, Sequence[str]]) -> str | None:
    """The digest, from {digest: names of what was evaluated on it}."""
    if len(by_digest) > 1:
        raise DifferentDataError(
            listed(
                "these were evaluated on different data, so their measures cannot be compared",
                [f"{digest}: {', '.join(names)}" for digest, names in by_digest.items()],
            )
            + f"\nchoose those of one kind with --run or --tag {EVALUATION_DATA_TAG}=HASH; or evaluate the others on "
            f"the same shards with `{evaluate.MADE_BY}`; or compare settings, speed and cost only, with "
            "--without-measures"
        )
    return next(iter(by_digest), None)


def _read_metrics(
    config: Config, runs: Sequence[TrackedRun], *, with_measures: bool
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Best]], dict[str, dict[str, History]]]:
    """Final values, best values, and the histories of training, each by metric and run."""
    final: dict[str, dict[str, float]] = {}
    best: dict[str, dict[str, Best]] = {}
    histories: dict[str, dict[str, History]] = {}
    smaller_is_better = {f"{EVALUATED}{measure.name}": measure.lower_is_better for measure in evaluate.MEASURES}
    prefixes = (TRAINED, COVERAGE, COST, *SPEEDS, *((EVALUATED,) if with_measures else ()))
    for run in runs:
        metrics = {m: value for m, value in run.metrics.items() if m.startswith(prefixes) and m not in _NOT_LOSSES}
        smaller_is_better |= {metric: True for metric in metrics if metric.startswith(TRAINED)}
        wanted = [metric for metric in metrics if metric in smaller_is_better or metric in SPEEDS]
        read = read_histories(config, run.run_id, wanted)
        for metric, last in metrics.items():
            points = [(step, value) for step, value in read.get(metric, ()) if abs(value) < _DIVERGED]
            # One step says little about speed, and the first of a start is slow: the middle one counts.
            is_speed = metric in SPEEDS and points
            final.setdefault(metric, {})[run.run_id] = float(np.median([v for _, v in points])) if is_speed else last
            if metric in smaller_is_better and points:
                choose = min if smaller_is_better[metric] else max
                step, value = choose(points, key=lambda point: point[1])
                best.setdefault(metric, {})[run.run_id] = Best(value, step)
            if metric.startswith(TRAINED):
                histories.setdefault(metric, {})[run.run_id] = points
    return final, best, histories


def _known_measures(tables: Mapping[str, Examples], final: Mapping[str, Mapping[str, float]]) -> list[Measure]:
    """Those of the evaluation and of the tables that any run has a value of, in their order."""
    known = {measure.name: measure for measure in evaluate.MEASURES}
    for table in tables.values():
        known |= {measure.name: measure for measure in table.measures if measure.name not in known}
    return [measure for name, measure in known.items() if f"{EVALUATED}{name}" in final]


def _test_groups(
    groups: Sequence[Group],
    baseline: Group | None,
    measures: Sequence[Measure],
    tables: Mapping[str, Examples],
    final: Mapping[str, Mapping[str, float]],
) -> tuple[list[Test], list[Test]]:
    """Every group against the baseline in every measure: on examples, and over seeds."""
    if baseline is None:
        return [], []
    others = [group for group in groups if group is not baseline]
    on_examples, over_seeds = [], []
    for group in others:
        for measure in measures:
            mine, base = (_mean_over_seeds(one, measure, tables, baseline) for one in (group, baseline))
            if mine is not None and base is not None:
                (one, counts), (other, same_counts) = mine, base
                if not np.array_equal(counts, same_counts):
                    raise UserError(
                        f"{group.name} and {baseline.name}: their examples have different numbers of {measure.count}, "
                        f"though the data is said to be the same; evaluate both again with `{evaluate.MADE_BY}`"
                    )
                on_examples.append((group, measure, paired_on_examples(one, other, counts)))
            values = final.get(f"{EVALUATED}{measure.name}", {})
            if measure.is_exponential:  # ln of perplexity is the mean negative log-likelihood: differences add up
                values = {run_id: math.log(value) for run_id, value in values.items()}
            difference = on_seeds(group.by_seed(values), baseline.by_seed(values))
            if difference is not None:
                over_seeds.append((group, measure, difference))
    return _corrected(on_examples), _corrected(over_seeds)


def _corrected(found: Sequence[tuple[Group, Measure, Difference]]) -> list[Test]:
    corrected = holm([difference.p_value for _, _, difference in found])
    return [Test(*one, p_value) for one, p_value in zip(found, corrected, strict=True)]


def _mean_over_seeds(
    group: Group, measure: Measure, tables: Mapping[str, Examples], baseline: Group
) -> tuple[np.ndarray, np.ndarray] | None:
    """Each example's mean sum over a group's runs [N] and its count [N], in the order of the baseline's first table."""
    first = next((tables[run.run_id] for run in baseline.runs if run.run_id in tables), None)
    sums, counts = [], None
    for run in group.runs:
        table = tables.get(run.run_id)
        if first is None or table is None or measure not in table.measures:
            continue
        if set(table.ids) != set(first.ids):
            raise UserError(
                f"{run.name} ({run.run_id}): its examples are not those of {baseline.name}, though the data is said to "
                f"be the same; evaluate both again with `{evaluate.MADE_BY}`"
            )
        place = {example: number for number, example in enumerate(table.ids)}
        order = [place[example] for example in first.ids]
        sums.append(table.columns[measure.total][order])
        counts = table.columns[measure.count][order]
    return None if counts is None else (np.mean(sums, axis=0), counts)


def _local_measures(config: Config) -> dict[str, tuple[str, dict[str, float]]]:
    """{model: (digest of the data, its measures)} of what was evaluated in the work directory."""
    found = {}
    for name, values in evaluate.load_measures(config).items():
        manifest = read_manifest(config.path(evaluate.FOLDER, name), "evaluation", made_by=evaluate.MADE_BY)
        found[name] = (manifest.inputs["shards"], values)
    return found


def _references(
    local: Mapping[str, tuple[str, dict[str, float]]],
    runs: Sequence[TrackedRun],
    data: str | None,
    selection: Selection,
) -> dict[str, dict[str, float]]:
    """Models that are no tracked runs, evaluated on the same data: the teacher, the student as it was cut, and without
    a selection the runs that the tracking server knows no measures of.
    """
    measured = {run.name for run in runs if any(metric.startswith(EVALUATED) for metric in run.metrics)}
    wanted = {
        name: digest
        for name, (digest, _) in local.items()
        if name in (evaluate.TEACHER, evaluate.CUT_STUDENT) or not (selection or name in measured)
    }
    if data is None:
        by_digest: dict[str, list[str]] = {}
        for name, digest in wanted.items():
            by_digest.setdefault(digest, []).append(name)
        data = _only_one(by_digest)
    return {name: local[name][1] for name, digest in wanted.items() if digest == data}


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
