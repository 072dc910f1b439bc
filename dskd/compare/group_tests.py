"""Tests of every group against the baseline, in every measure: example by example, and over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dskd.artifacts import kinds
from dskd.compare.groups import Group
from dskd.compare.metrics import EVALUATED
from dskd.compare.statistics import LEVEL, Difference, holm, on_seeds, paired_on_examples
from dskd.errors import UserError
from dskd.evaluation.scores_by_example import Examples, Measure


@dataclass(frozen=True)
class Test:
    """A test of a group against the baseline in one measure."""

    group: Group
    measure: Measure
    difference: Difference
    corrected_p: float  # by Holm, over the tests of its kind in this comparison

    @property
    def is_better(self) -> bool | None:
        """True if the group is better than the baseline, False if it is worse, None if the test shows neither."""
        if not self.corrected_p < LEVEL:
            return None
        return (self.difference.value < 0) == self.measure.lower_is_better


def test_groups(
    groups: Sequence[Group],
    baseline: Group | None,
    measures: Sequence[tuple[Measure, Mapping[str, Examples]]],
    final: Mapping[str, Mapping[str, float]],
) -> tuple[list[Test], list[Test]]:
    """Returns the tests on examples, and the tests over seeds, of every group against the baseline; none without one.

    `measures` has each measure with its tables of examples by run id, for the tests on examples, and `final` is
    {metric: {run id: value}}, for those over seeds. Raises a UserError when examples have different ids or counts,
    although the data has the same digest.
    """
    if baseline is None:
        return [], []
    others = [group for group in groups if group is not baseline]
    on_examples, over_seeds = [], []
    for group in others:
        for measure, tables in measures:
            of_group, of_baseline = (_mean_over_seeds(side, measure, tables, baseline) for side in (group, baseline))
            if of_group is not None and of_baseline is not None:
                (one, counts), (other, baseline_counts) = of_group, of_baseline
                if not np.array_equal(counts, baseline_counts):
                    raise UserError(
                        f"{group.name} and {baseline.name}: their examples have different numbers of {measure.count}, "
                        "although the digests of their data are equal; evaluate both again with "
                        f"`{kinds.EVALUATION.made_by}`"
                    )
                on_examples.append((group, measure, paired_on_examples(one, other, counts)))
            values = final.get(f"{EVALUATED}{measure.name}", {})
            if measure.is_exponential:  # compare ln(perplexity), the mean negative log-likelihood
                values = {run_id: math.log(value) for run_id, value in values.items()}
            difference = on_seeds(group.by_seed(values), baseline.by_seed(values))
            if difference is not None:
                over_seeds.append((group, measure, difference))
    return _corrected(on_examples), _corrected(over_seeds)


def _corrected(differences: Sequence[tuple[Group, Measure, Difference]]) -> list[Test]:
    corrected = holm([difference.p_value for _, _, difference in differences])
    return [Test(*compared, p_value) for compared, p_value in zip(differences, corrected, strict=True)]


def _mean_over_seeds(
    group: Group, measure: Measure, tables: Mapping[str, Examples], baseline: Group
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns, for each example, its sum averaged over the group's runs [N] and its count [N].

    The examples are in the order of the baseline's first table. Returns None if no run of the group has the measure.
    """
    first = next((tables[run.run_id] for run in baseline.runs if run.run_id in tables), None)
    sums, counts = [], None
    for run in group.runs:
        table = tables.get(run.run_id)
        if first is None or table is None or measure.name not in {m.name for m in table.measures}:
            continue
        if set(table.ids) != set(first.ids):
            raise UserError(
                f"{run.name} ({run.run_id}) and {baseline.name}: their examples have different ids, although the "
                f"digests of their data are equal; evaluate both again with `{kinds.EVALUATION.made_by}`"
            )
        index = {example: number for number, example in enumerate(table.ids)}
        order = [index[example] for example in first.ids]
        sums.append(table.columns[measure.total][order])
        counts = table.columns[measure.count][order]
    return None if counts is None else (np.mean(sums, axis=0), counts)
