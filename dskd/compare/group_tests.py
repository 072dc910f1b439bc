"""Every group against the baseline, in every measure: on the results of each example, and over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dskd.artifacts import kinds
from dskd.compare.groups import Group
from dskd.compare.metrics import EVALUATED
from dskd.compare.statistics import Difference, holm, on_seeds, paired_on_examples
from dskd.errors import UserError
from dskd.evaluation.scores_by_example import Examples, Measure

_LEVEL = 0.05


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
        if not self.corrected_p < _LEVEL:
            return None
        return (self.difference.value < 0) == self.measure.lower_is_better


def test_groups(
    groups: Sequence[Group],
    baseline: Group | None,
    measures: Sequence[tuple[Measure, Mapping[str, Examples]]],
    final: Mapping[str, Mapping[str, float]],
) -> tuple[list[Test], list[Test]]:
    """The tests on examples, from each measure's tables by run id, and those over seeds, from
    {metric: {run id: value}}.

    Raises:
        UserError: when examples of one id are not the same after all.
    """
    if baseline is None:
        return [], []
    others = [group for group in groups if group is not baseline]
    on_examples, over_seeds = [], []
    for group in others:
        for measure, tables in measures:
            mine, base = (_mean_over_seeds(one, measure, tables, baseline) for one in (group, baseline))
            if mine is not None and base is not None:
                (one, counts), (other, same_counts) = mine, base
                if not np.array_equal(counts, same_counts):
                    raise UserError(
                        f"{group.name} and {baseline.name}: their examples have different numbers of {measure.count}, "
                        f"though the data is said to be the same; evaluate both again with `{kinds.EVALUATION.made_by}`"
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
        if first is None or table is None or measure.name not in {one.name for one in table.measures}:
            continue
        if set(table.ids) != set(first.ids):
            raise UserError(
                f"{run.name} ({run.run_id}): its examples are not those of {baseline.name}, though the data is said to "
                f"be the same; evaluate both again with `{kinds.EVALUATION.made_by}`"
            )
        place = {example: number for number, example in enumerate(table.ids)}
        order = [place[example] for example in first.ids]
        sums.append(table.columns[measure.total][order])
        counts = table.columns[measure.count][order]
    return None if counts is None else (np.mean(sums, axis=0), counts)
