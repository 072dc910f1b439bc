"""Names of metrics and formats of their numbers, the same in text and report."""

import math
from collections import Counter
from collections.abc import Mapping

from dskd.compare.comparison import Comparison
from dskd.compare.continuations import Continuations
from dskd.compare.group_tests import Test
from dskd.compare.groups import Group
from dskd.compare.metrics import COST, COVERAGE, EVALUATED, TRAINED, Best
from dskd.compare.statistics import INTERVAL, Estimate
from dskd.evaluation.models import LABELS
from dskd.evaluation.scores_by_example import Measure
from dskd.losses import terms

_OF_ANY_SIZE = ("train/", "speed/")
_LABELS = {
    "agreement": "agrees with teacher",
    "lexical_perplexity": "perplexity, lexical targets",
    **terms.labels(),
    "speed/tokens_per_s": "tokens/s, median step",
    "speed/step_s": "seconds a step, median",
    "coverage/with_senses": "targets with senses",
    "coverage/with_synonyms": "targets with synonyms",
    "coverage/with_antonyms": "targets with antonyms",
}


def label(metric: str) -> str:
    """Returns the name shown for a metric or a measure."""
    name = metric.removeprefix(EVALUATED)
    return _LABELS.get(name, name.removeprefix(TRAINED).replace("_", " "))


def reference_label(name: str) -> str:
    """Returns the name shown for a model that is not a tracked run."""
    return LABELS.get(name, name)


def rows_of_continuations(continuations: Continuations) -> list[tuple[str, str]]:
    """Returns the continuations of a prompt as rows: the label of a model, or of the text itself, and what it says."""
    rows = [(reference_label(name), text or "(nothing)") for name, text in continuations.continuations]
    return [*rows, ("(the text itself)", continuations.itself)] if continuations.itself else rows


def number(metric: str, value: float) -> str:
    """Formats a value with the number of digits that suits its metric."""
    if not abs(value) < 1e9:
        return f"{value:.3g}"
    if metric == COST:
        return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
    if metric.startswith(COVERAGE):
        return f"{100 * value:.1f} %"
    if "perplexity" in metric:
        return f"{value:,.2f}"
    if metric.startswith(_OF_ANY_SIZE):
        return f"{value:,.{_decimals(value)}f}" if not value or abs(value) >= 1e-3 else f"{value:.3g}"
    return f"{value:.4f}"


def estimate(metric: str, estimated: Estimate | None) -> str:
    """Formats a mean over seeds ± half of its 95 % interval; for one seed, the value alone."""
    if estimated is None:
        return "-"
    text = number(metric, estimated.mean)
    if estimated.half_width is None:
        return text
    if metric.startswith(_OF_ANY_SIZE) and 1e-3 <= abs(estimated.mean) < 1e9:  # both with the same number of decimals
        return f"{text} ± {estimated.half_width:,.{_decimals(estimated.mean)}f}"
    return f"{text.removesuffix(' %')} ± {number(metric, estimated.half_width)}"


def best(metric: str, group: Group, bests_by_run: Mapping[str, Best]) -> str:
    """Formats the best value, as a mean over seeds, and the range of the steps at which the runs had it."""
    bests = [bests_by_run[run.run_id] for run in group.runs if run.run_id in bests_by_run]
    if not bests:
        return "-"
    steps = sorted({best_of_run.step for best_of_run in bests})
    shown = str(steps[0]) if len(steps) == 1 else f"{steps[0]}…{steps[-1]}"
    return f"{estimate(metric, Estimate.of([best_of_run.value for best_of_run in bests]))} @ {shown}"


def difference(test: Test) -> tuple[str, str]:
    """Formats a difference and its 95 % interval: nats per target for a perplexity, percentage points for a share."""
    result = test.difference
    scale, digits = (1.0, 4) if test.measure.is_exponential else (100.0, 2)
    value, low, high = (signed(scale * number, digits) for number in (result.value, result.low, result.high))
    return value, f"[{low}, {high}]"


def compared(measure: Measure) -> str:
    """Returns the quantity that is compared for a measure, with its unit."""
    name = label(measure.name)
    return f"ln {name} (nats)" if measure.is_exponential else f"{name} (points)"


def unit(measure: Measure) -> str:
    """Returns the unit on the axis of a difference."""
    return "nats a target" if measure.is_exponential else "points of a hundred"


def as_factor(test: Test) -> str:
    """Formats a difference of logarithms as the factor between the perplexities; "" for other measures."""
    return f"× {math.exp(test.difference.value):.3f}" if test.measure.is_exponential else ""


def _decimals(value: float) -> int:
    """Returns the number of decimals with which a number has four digits, at most 6."""
    return min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0


def p_value(value: float) -> str:
    """Formats a p-value with three decimals; smaller ones as "< 0.001", so that none is shown as zero."""
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def signed(value: float, digits: int) -> str:
    """Formats a value with its sign, using a true minus sign, and without a sign if it rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def verdict(test: Test) -> str:
    """Returns the conclusion that the corrected p-value allows."""
    return {True: "better", False: "worse", None: "not shown"}[test.is_better]


def status(group: Group) -> str:
    """Returns the status of the group's runs, such as `finished`, or the number of runs with each status."""
    statuses = Counter(run.status.lower() for run in group.runs)
    return ", ".join(f"{count} {status}" if len(statuses) > 1 else status for status, count in statuses.items())


def cost_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Returns the rows of the cost, one for each kind of device, as (label, a cell for each group)."""
    hours = comparison.final.get(COST, {})
    rows = []
    for device in sorted({run.tags.get("device", "device") for run in comparison.runs if run.run_id in hours}):
        of_device = {
            run.run_id: hours[run.run_id]
            for run in comparison.runs
            if run.tags.get("device", "device") == device and run.run_id in hours
        }
        label = "GPU hours a run" if device == "cuda" else f"{device.upper()} rank hours a run"
        rows.append((label, [estimate(COST, group.estimate(of_device)) for group in comparison.groups]))
    return rows or [("GPU hours a run", ["-" for _ in comparison.groups])]


def method_notes(comparison: Comparison) -> list[str]:
    """Returns notes on what the intervals and tests mean, and what they do not cover."""
    notes = []
    single = [group.name for group in comparison.groups if len(group.runs) == 1]
    if len(single) < len(comparison.groups):
        notes.append(f"± is half of the {INTERVAL} of the mean over seeds, by Student's t")
    if single:
        notes.append(f"1 seed, so no interval: {', '.join(single)}")
    if comparison.example_tests:
        examples = max(test.difference.count for test in comparison.example_tests)
        notes.append(
            f"example by example: paired t test over up to {examples:,} examples, each the mean of a group's seeds, "
            f"weighted by its tokens; p by Holm's correction over these {len(comparison.example_tests)} tests. It asks "
            "whether these very models differ on other text of this kind, and does not cover how much another seed "
            "would change"
        )
    if comparison.seed_tests:
        notes.append(
            f"seed by seed: asks whether other trainings would differ; p by Holm's correction over these "
            f"{len(comparison.seed_tests)} tests"
        )
    elif comparison.example_tests:
        notes.append("no test over seeds: it needs two seeds or more in both groups")
    return notes
