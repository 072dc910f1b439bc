"""What metrics are called, and how their numbers are written; the same in text and report."""

import math
from collections.abc import Mapping

from dskd.compare.comparison import Comparison
from dskd.compare.group_tests import Test
from dskd.compare.groups import Group
from dskd.compare.metrics import COST, COVERAGE, EVALUATED, TRAINED, Best
from dskd.compare.statistics import Estimate
from dskd.evaluation.models import CUT_STUDENT, TEACHER
from dskd.evaluation.scores_by_example import Measure

MINUS, TIMES = "−", "×"
_OF_ANY_SIZE = ("train/", "speed/")
_LABELS = {
    "agreement": "agrees with teacher",
    "lexical_perplexity": "perplexity, lexical targets",
    "train/loss": "loss",
    "train/ce": "cross-entropy (nats)",
    "train/kl": "divergence from the teacher (nats)",
    "train/sense": "sense loss",
    "train/hidden": "hidden-state distance",
    "speed/tokens_per_s": "tokens/s, median step",
    "speed/step_s": "seconds a step, median",
    "coverage/with_senses": "targets with senses",
    "coverage/with_synonyms": "targets with synonyms",
    "coverage/with_antonyms": "targets with antonyms",
}
_REFERENCES = {TEACHER: "teacher", CUT_STUDENT: "cut student, untrained"}


def label(metric: str) -> str:
    """What a metric, or a measure, is called."""
    name = metric.removeprefix(EVALUATED)
    return _LABELS.get(name, name.removeprefix(TRAINED).replace("_", " "))


def reference_label(name: str) -> str:
    """What a model that is no tracked run is called."""
    return _REFERENCES.get(name, name)


def cost_label(device: str) -> str:
    """Device hours are GPU hours only where the devices were GPUs."""
    return "GPU hours a run" if device == "cuda" else f"{device.upper()} rank hours a run"


def number(metric: str, value: float) -> str:
    """A value, with as many digits as are read."""
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


def estimate(metric: str, found: Estimate | None) -> str:
    """A mean over seeds ± half of its 95 % interval; of one seed the value alone."""
    if found is None:
        return "-"
    text = number(metric, found.mean)
    if found.half_width is None:
        return text
    if metric.startswith(_OF_ANY_SIZE) and 1e-3 <= abs(found.mean) < 1e9:  # both to the same place
        return f"{text} ± {found.half_width:,.{_decimals(found.mean)}f}"
    return f"{text.removesuffix(' %')} ± {number(metric, found.half_width)}"


def best(metric: str, group: Group, found: Mapping[str, Best]) -> str:
    """The best value, mean over seeds, and the step at which each run had it."""
    bests = [found[run.run_id] for run in group.runs if run.run_id in found]
    if not bests:
        return "-"
    steps = sorted({one.step for one in bests})
    shown = str(steps[0]) if len(steps) == 1 else f"{steps[0]}…{steps[-1]}"
    return f"{estimate(metric, Estimate.of([one.value for one in bests]))} @ {shown}"


def difference(test: Test) -> tuple[str, str]:
    """The difference and its 95 % interval: of a perplexity in nats a target, of a share in points of a hundred."""
    found = test.difference
    scale, digits = (1.0, 4) if test.measure.is_exponential else (100.0, 2)
    value, low, high = (signed(scale * one, digits) for one in (found.value, found.low, found.high))
    return value, f"[{low}, {high}]"


def compared(measure: Measure) -> str:
    """What of a measure a difference is of, with its unit."""
    name = label(measure.name)
    return f"ln {name} (nats)" if measure.is_exponential else f"{name} (points)"


def unit(measure: Measure) -> str:
    """The axis of a difference."""
    return "nats a target" if measure.is_exponential else "points of a hundred"


def as_factor(test: Test) -> str:
    """A difference of logarithms as what the perplexity is multiplied by."""
    return f"{TIMES} {math.exp(test.difference.value):.3f}" if test.measure.is_exponential else ""


def _decimals(value: float) -> int:
    """Places behind the point with which a number has four digits."""
    return min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0


def p_value(value: float) -> str:
    """Three digits, and no zero that is none."""
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def signed(value: float, digits: int) -> str:
    """With its sign, a real minus, and none on what rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def verdict(test: Test) -> str:
    """What the corrected p-value allows to say."""
    return {True: "better", False: "worse", None: "not shown"}[test.is_better]


def status(group: Group) -> str:
    """`finished`, or how many runs are what."""
    found = [run.status.lower() for run in group.runs]
    if len(set(found)) == 1:
        return found[0]
    return ", ".join(f"{found.count(one)} {one}" for one in dict.fromkeys(found))


def cost_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(label, a cell for each group) of the cost, a row for each kind of device."""
    hours = comparison.final.get(COST, {})
    rows = []
    for device in sorted({run.tags.get("device", "device") for run in comparison.runs if run.run_id in hours}):
        mine = {
            run.run_id: hours[run.run_id]
            for run in comparison.runs
            if run.tags.get("device", "device") == device and run.run_id in hours
        }
        rows.append((cost_label(device), [estimate(COST, group.estimate(mine)) for group in comparison.groups]))
    return rows or [("GPU hours a run", ["-" for _ in comparison.groups])]


def method_notes(comparison: Comparison) -> list[str]:
    """What the intervals and tests are, and what they are not."""
    notes = []
    single = [group.name for group in comparison.groups if len(group.runs) == 1]
    if len(single) < len(comparison.groups):
        notes.append("± is half of the 95 % interval of the mean over seeds, by Student's t")
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
