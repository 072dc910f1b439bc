"""The report of the study. All of its figures come from the results file."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import study
from benchmarks.quality.drawing import draw_differences
from benchmarks.quality.measures import DIGITS, ERROR, GEOMETRY, ITEMS, KNOWLEDGE, ON_TEXT
from benchmarks.quality.results import REFERENCES, TEACHER, Result, choose
from dskd.compare.statistics import CONFIDENCE, Difference, Estimate, holm, on_seeds

_FIRST, _LEXICAL = ON_TEXT[0], ON_TEXT[2]
PICTURE = "differences.svg"
_TESTED = ("test", None)
_LEVEL = round(100 * CONFIDENCE)
Trained = tuple[str, str | None]  # a stage, and the factor that was changed
_LEXICAL_MEASURES = """All states are those from which the model predicts the word, which the sense loss trains.
Separation (ROC AUC): are examples of one sense more alike than examples of different senses? Retrieval: is an
example's sense the nearest among those of its lemma? Preference: does the model prefer a synonym in a sentence to an
antonym of about the same frequency? Alignment (on the held-out text): is a row of P_i nearer to the state than every
row of N_i? The definitions are in `dskd/evaluation/lexical`. The row "letters" has the scores of the letters of the
text, without a model. If the teacher is no better than the letters, or than the untrained student, it has nothing to
teach, and the measure cannot tell the arms apart. The items are from all of the held-out text, including the part on
which weights were chosen."""


def write_report(results: Sequence[Result], path: Path) -> None:
    """Writes the Markdown of :func:`render` to `path`, and its picture to the same folder."""
    path.write_text(render(results), encoding="utf-8")
    draw_differences(
        {
            (measure, baseline): {
                arm.name: measured
                for arm in study.ARMS
                if (measured := difference(results, _TESTED, arm.name, _TESTED, baseline, measure)) is not None
                and arm.name != baseline
            }
            for measure in ("perplexity", "lexical_perplexity")
            for baseline in study.BASELINES
        },
        path.with_name(PICTURE),
    )


SUMMARY_MARKS = ("<!-- of benchmarks/quality -->\n", "<!-- end -->")
_SUMMARY = {
    "kd-paper": "ce",
    "dskd-paper": "kd-paper",
    "kd": "ce",
    "kd-hidden": "kd",
    "kd-own": "kd",
    "kd-synonyms": "kd",
    "dskd": "kd",
    "dskd-papers-rule": "kd",
} | {name: "kd-hidden" for name in ("hidden-dskd", "hidden-distribution", "hidden-distribution-own", "hidden-lexical")}
_OF_SUMMARY = ("perplexity", "lexical_perplexity", "synonym_preference")


def render_summary(results: Sequence[Result]) -> str:
    """Returns the table of docs/results.md: each arm against the one that it adds something to."""
    rows = []
    for name, other in _SUMMARY.items():
        differences = [difference(results, _TESTED, name, _TESTED, other, measure) for measure in _OF_SUMMARY]
        if None not in differences:
            cells = [_shown(tested, measure) for tested, measure in zip(differences, _OF_SUMMARY, strict=True)]
            arm = study.BY_NAME[name]
            weight = f"{arm.tuned_key.rpartition('.')[2]} {choose(results, arm):g}"
            rows.append([f"`{name}`: {arm.description} ({weight})", f"`{other}`", *cells])
    names = [measure.replace("_", " ") for measure in _OF_SUMMARY]
    if not rows:
        return "There are no results yet.\n"
    of_teacher = next((r.measures for r in results if (r.arm, r.variant) == (TEACHER, None)), {})
    geometry = ""
    if ERROR.format(GEOMETRY) in of_teacher:
        share = f"{of_teacher[GEOMETRY]:.3f} (s.e. {of_teacher[ERROR.format(GEOMETRY)]:.3f})"
        geometry = f" In the teacher, the synonym is nearer in {share} of the pairs of a word's synonym and antonym."
    of_kd = [result.measures for result in results if (result.stage, result.arm) == ("test", "kd")]
    levels = ""
    if of_kd:
        whole, lexical = (statistics.mean(measures[name] for measures in of_kd) for name in (_FIRST, _LEXICAL))
        levels = f" The perplexity of `kd` is {whole:.1f}, and {lexical:.0f} on targets with relations."
    table = _table(["way to train", "against", *names], rows)
    return f"{table}\n\nMeasured {_when(results)}.{levels}{geometry}\n"


def write_summary(results: Sequence[Result], path: Path) -> None:
    """Writes the text of :func:`render_summary` between its marks in a Markdown file."""
    begin, end = SUMMARY_MARKS
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}{render_summary(results)}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def render(results: Sequence[Result]) -> str:
    """Returns the whole report as Markdown."""
    parts = ["# Do senses help?", "", _about(results), "", "## Tuned weights", "", _tuned(results)]
    parts += ["", "## Test", "", _tested(results, ON_TEXT)]
    if any(result.stage == "test" for result in results):
        parts += ["", f"![differences with their intervals]({PICTURE})"]
    for baseline in study.BASELINES:
        parts += ["", f"### Against {baseline}, seed by seed", "", _against(results, baseline, ON_TEXT)]
    parts += ["", "## What they know of held-out words", "", _LEXICAL_MEASURES, "", _tested(results, KNOWLEDGE)]
    parts += ["", f"### Against {study.BASELINES[-1]}, seed by seed", ""]
    parts += [_against(results, study.BASELINES[-1], KNOWLEDGE)]
    parts += ["", "## One thing changed", "", _factors(results), "", "## Not run", "", _missing(results)]
    return "\n".join(parts) + "\n"


def _about(results: Sequence[Result]) -> str:
    if not results:
        return "There are no results yet."
    trainings = [result for result in results if result.arm not in REFERENCES]
    minutes = sum(result.seconds for result in trainings) / 60
    places = "; ".join(sorted({result.machine for result in results}))
    return (
        f"{_when(results)}; {places}. {len(trainings)} trainings, {minutes:.0f} minutes of training and measuring. "
        "`python -m benchmarks.quality --report` wrote this page from `results.jsonl`. Intervals are "
        f"{_LEVEL} % intervals of Student's t over seeds. All seeds start from one student, cut from one teacher, and "
        "are measured on one text; they differ in the order of the training text and in the positions of the sense "
        "loss. The intervals therefore do not cover other teachers, or other sentences to measure on, which would "
        "change a difference, too: see the teacher's standard errors (s.e.) below."
    )


def _when(results: Sequence[Result]) -> str:
    dates = sorted({result.date for result in results})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _tuned(results: Sequence[Result]) -> str:
    rows = []
    for arm in study.ARMS:
        done = {
            result.value: f"{result.value:g}: {result.measures[_FIRST]:.2f} / {result.measures[_LEXICAL]:.1f}"
            for result in results
            if (result.stage, result.arm) == ("tune", arm.name)
        }
        if arm.is_tuned:
            tried = ", ".join(done[value] for value in arm.trials if value in done) or "none yet"
        else:
            tried = "not tuned"
        also_tried = ", ".join(done[value] for value in arm.extra_values if value in done)
        best = choose(results, arm)
        chosen = "" if best is None else f"{best:g}"
        if arm.is_tuned and best in {min(arm.trials), max(arm.trials)}:
            chosen += ", an end"
        rows.append([arm.name, arm.description, arm.based_on or "", f"`{arm.tuned_key}`", tried, also_tried, chosen])
    header = ["arm", "description", "builds on", "tuned key", "trials", "also tried", "chosen"]
    return (
        "The values are perplexity / perplexity on targets with relations, both on the validation part, with one seed. "
        f"Of the {study.NUM_TRIALS} trials of an arm, the one with the lowest perplexity is chosen; values that were "
        'also tried are never chosen. If the first or last trial is chosen ("an end"), a weight beyond it may '
        "be better.\n\n" + _table(header, rows)
    )


def _tested(results: Sequence[Result], measures: Sequence[str]) -> str:
    rows = []
    for name in (*REFERENCES, *(arm.name for arm in study.ARMS)):
        of_arm = [result for result in results if (result.stage, result.arm) == ("test", name)]
        cells = [_cell(of_arm, measure) for measure in measures]
        if any(cells):
            rows.append([name, str(len(of_arm)) if name not in REFERENCES else "", *cells])
    return _table(["arm", "seeds", *measures], rows) if rows else "There are no results yet."


def _cell(results: Sequence[Result], measure: str) -> str:
    values = [result.measures[measure] for result in results if measure in result.measures]
    if not values:
        return ""
    error, items = (results[0].measures.get(name.format(measure)) for name in (ERROR, ITEMS))
    error_text = "" if error is None else f" (s.e. {error:.{DIGITS[measure]}f}, {items:,.0f} items)"
    return _estimate(values, measure) + error_text


def _against(results: Sequence[Result], baseline: str, measures: Sequence[str]) -> str:
    differences = {
        arm.name: [difference(results, _TESTED, arm.name, _TESTED, baseline, measure) for measure in measures]
        for arm in study.ARMS
        if arm.name != baseline
    }
    whole = {
        name: [tested for tested in of_measures if tested is not None]
        for name, of_measures in differences.items()
        if None not in of_measures
    }
    if not whole:
        return "There is nothing to compare yet: a difference needs two seeds of both arms."
    p_values = iter(holm([tested.p_value for of_measures in whole.values() for tested in of_measures]))
    rows = [
        [name, *(_shown(tested, m, next(p_values)) for tested, m in zip(of_measures, measures, strict=True))]
        for name, of_measures in whole.items()
    ]
    return (
        _table(["arm", *measures], rows)
        + "\n\nEach cell has the difference [interval] and the p-value of the paired t test, corrected by Holm's "
        "method over this table."
    )


def _factors(results: Sequence[Result]) -> str:
    rows = []
    for factor in (None, *study.FACTORS):
        variant = factor.name if factor else None
        teachers = [r for r in results if (r.arm, r.variant) == (TEACHER, variant)]
        with_baseline = study.is_needed(factor, study.FACTOR_BASELINE)
        baseline = ("factor", variant) if with_baseline else ("test", None)
        for name in study.FACTOR_ARMS[1:]:
            cells = [
                _shown(difference(results, ("factor", variant), name, baseline, study.FACTOR_BASELINE, m), m)
                for m in ON_TEXT[:3]
            ]
            if all(cells):
                of_teacher = teachers[0].measures if teachers else {}
                perplexity = f"{of_teacher[_FIRST]:.1f}" if _FIRST in of_teacher else ""
                geometry = f"{of_teacher[GEOMETRY]:.3f}" if GEOMETRY in of_teacher else ""
                rows.append(
                    [variant or "nothing", perplexity, geometry, _mean_baseline(results, baseline), name, *cells]
                )
    if not rows:
        return "There are no results yet."
    against = f"{study.FACTOR_BASELINE}: {_FIRST}, {_LEXICAL}"
    header = ["changed", "teacher's perplexity", GEOMETRY, against, "arm", *ON_TEXT[:3]]
    return (
        f"Differences to {study.FACTOR_BASELINE} over the same seeds, with the weights tuned above, except for a sense "
        f"weight of {study.FACTOR_SENSE_WEIGHT:g}, the paper's, because the weights that tuning chose are too small to "
        "show anything. The intervals are not corrected for the number of comparisons, so they are only leads. "
        f"{GEOMETRY} is the teacher's share, from `dskd senses geometry`, of pairs of a word's synonym and antonym in "
        "which the synonym is nearer.\n\n" + _table(header, rows)
    )


def _mean_baseline(results: Sequence[Result], trained: Trained) -> str:
    of_baseline = [
        r.measures
        for r in results
        if (r.stage, r.variant, r.arm) == (*trained, study.FACTOR_BASELINE) and r.seed in study.FACTOR_SEEDS
    ]
    return ", ".join(f"{statistics.mean(m[name] for m in of_baseline):.1f}" for name in (_FIRST, _LEXICAL))


def _missing(results: Sequence[Result]) -> str:
    lines = []
    for arm in study.ARMS:
        tested = {r.seed for r in results if (r.stage, r.arm) == ("test", arm.name)}
        if set(study.TEST_SEEDS) - tested:
            lines.append(f"- {arm.name}: {len(tested)} of {len(study.TEST_SEEDS)} seeds of the test")
    for factor in (None, *study.FACTORS):
        variant = factor.name if factor else None
        done = sum((r.stage, r.variant) == ("factor", variant) and r.arm in study.FACTOR_ARMS for r in results)
        needed = len(study.FACTOR_SEEDS) * sum(study.is_needed(factor, arm) for arm in study.FACTOR_ARMS)
        if done < needed:
            lines.append(f"- {variant or 'nothing changed but the sense weight'}: {done} of {needed} trainings")
    return "\n".join(lines) or "All trainings of the study were run."


def difference(
    results: Sequence[Result], trained: Trained, name: str, other_trained: Trained, other: str, measure: str
) -> Difference | None:
    """Returns the difference of one arm to another over the seeds that both have; None with fewer than two seeds."""

    def by_seed(where: Trained, name: str) -> dict[str, list[float]]:
        stage, factor = where
        variant = factor or study.BY_NAME[name].past_variant
        return {
            str(r.seed): [r.measures[measure]]
            for r in results
            if (r.stage, r.arm, r.variant) == (stage, name, variant) and measure in r.measures
        }

    first, second = by_seed(trained, name), by_seed(other_trained, other)
    seeds = first.keys() & second.keys()
    return on_seeds({seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds})


def _estimate(values: Sequence[float], measure: str) -> str:
    estimate, digits = Estimate.of(values), DIGITS[measure]
    interval = "" if estimate.half_width is None else f" ± {estimate.half_width:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{interval}"


def _shown(difference: Difference | None, measure: str, p_value: float | None = None) -> str:
    if difference is None:
        return ""
    digits = DIGITS[measure]
    value, low, high = (f"{x:+.{digits}f}" for x in (difference.value, difference.low, difference.high))
    return f"{value} [{low}, {high}]" + ("" if p_value is None else f", p = {p_value:.2g}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
