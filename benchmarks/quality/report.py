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
_LEXICAL_MEASURES = """Before the word is said, from the state that the sense loss works on: do examples of one sense
lie together (separation, ROC AUC), and is an example's sense the first among those of its lemma (retrieval)? Does the
model rather put a synonym than an antonym of about the same frequency into a sentence (preference)? And is a row of P_i
nearer to the state than every row of N_i (sense_alignment, on the held-out text)? Definitions are in
`dskd/evaluation/lexical`; "letters" is what the letters of the text give without a model. Where the teacher is no
better than letters, or than the student as it was cut, there is nothing to be taught, and the measure cannot tell the
arms apart. The items are of all held-out text, also of the part that weights were chosen on."""

_REMOVED_ARM = """`dskd-papers-rule` was `dskd` with a token's own rows among the candidates for N_i, as in the
published code. It was tuned and tested like the other arms, with five seeds, and equals `dskd`: perplexity
+0.000 [-0.000, +0.000], perplexity on targets with relations +0.0 [+0.0, +0.0], preference of synonyms
+0.000 [+0.000, +0.000]. So dskd no longer has that option. The trainings of this arm are still among the results, but
the corrections of p above do not count it."""


def write_report(results: Sequence[Result], path: Path) -> None:
    """Writes the Markdown of :func:`render` to `path`, and its picture to the same folder."""
    path.write_text(render(results), encoding="utf-8")
    draw_differences(
        {
            (measure, baseline): {
                arm.name: found
                for arm in study.ARMS
                if (found := difference(results, _TESTED, arm.name, _TESTED, baseline, measure)) is not None
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
} | {name: "kd-hidden" for name in ("hidden-dskd", "hidden-distribution", "hidden-distribution-own", "hidden-lexical")}
_OF_SUMMARY = ("perplexity", "lexical_perplexity", "synonym_preference")


def render_summary(results: Sequence[Result]) -> str:
    """Returns the table of docs/results.md: each arm against the one that it adds something to."""
    rows = []
    for name, other in _SUMMARY.items():
        found = [difference(results, _TESTED, name, _TESTED, other, measure) for measure in _OF_SUMMARY]
        if None not in found:
            cells = [_shown(one, measure) for one, measure in zip(found, _OF_SUMMARY, strict=True)]
            arm = study.BY_NAME[name]
            weight = f"{arm.tuned.rpartition('.')[2]} {choose(results, arm):g}"
            rows.append([f"`{name}`: {arm.what} ({weight})", f"`{other}`", *cells])
    names = [measure.replace("_", " ") for measure in _OF_SUMMARY]
    if not rows:
        return "Nothing yet.\n"
    of_teacher = next((r.measures for r in results if (r.arm, r.variant) == (TEACHER, None)), {})
    geometry = ""
    if ERROR.format(GEOMETRY) in of_teacher:
        share = f"{of_teacher[GEOMETRY]:.3f} (s.e. {of_teacher[ERROR.format(GEOMETRY)]:.3f})"
        geometry = f" Of the teacher's pairs of a word's synonym and antonym the synonym is nearer in {share}."
    of_kd = [result.measures for result in results if (result.stage, result.arm) == ("test", "kd")]
    levels = ""
    if of_kd:
        whole, lexical = (statistics.mean(measures[name] for measures in of_kd) for name in (_FIRST, _LEXICAL))
        levels = f" The perplexity of `kd` is {whole:.1f}, on targets with relations {lexical:.0f}."
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
    parts += ["", "## One thing changed", "", _factors(results)]
    parts += ["", "## An arm that was removed", "", _REMOVED_ARM, "", "## Not run", "", _missing(results)]
    return "\n".join(parts) + "\n"


def _about(results: Sequence[Result]) -> str:
    if not results:
        return "Nothing has been run: there is no result, and nothing can be said for or against the method."
    trainings = [result for result in results if result.arm not in REFERENCES]
    minutes = sum(result.seconds for result in trainings) / 60
    places = "; ".join(sorted({result.machine for result in results}))
    return (
        f"{_when(results)}; {places}. {len(trainings)} trainings, {minutes:.0f} minutes of training and measuring. "
        f"Written by `python -m benchmarks.quality --report` from `results.jsonl`; intervals are of {_LEVEL} %, of "
        "Student's t over seeds. All seeds start from one student, cut from one teacher, and are measured on one text: "
        "they vary the order of the training's text and the positions of the sense loss. The intervals say nothing of "
        "other teachers, and nothing of other sentences to measure on, which would move a difference as well: see the "
        "teacher's standard errors (s.e.) below."
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
        beside = ", ".join(done[value] for value in arm.beyond if value in done)
        best = choose(results, arm)
        chosen = "" if best is None else f"{best:g}"
        if arm.is_tuned and best in {min(arm.trials), max(arm.trials)}:
            chosen += ", an end"
        rows.append([arm.name, arm.what, arm.on or "", f"`{arm.tuned}`", tried, beside, chosen])
    header = ["arm", "what", "stands on", "tuned", "trials", "looked at besides", "chosen"]
    return (
        "Perplexity / perplexity on targets with relations, both on the validation part, one seed. The first chooses "
        f"among {study.NUM_TRIALS} trials of every arm; what was looked at besides cannot be chosen. Where an end of "
        "the trials is chosen, the best weight may lie beyond.\n\n" + _table(header, rows)
    )


def _tested(results: Sequence[Result], measures: Sequence[str]) -> str:
    rows = []
    for name in (*REFERENCES, *(arm.name for arm in study.ARMS)):
        found = [result for result in results if (result.stage, result.arm) == ("test", name)]
        cells = [_cell(found, measure) for measure in measures]
        if any(cells):
            rows.append([name, str(len(found)) if name not in REFERENCES else "", *cells])
    return _table(["arm", "seeds", *measures], rows) if rows else "Nothing yet."


def _cell(found: Sequence[Result], measure: str) -> str:
    values = [result.measures[measure] for result in found if measure in result.measures]
    if not values:
        return ""
    error, items = (found[0].measures.get(name.format(measure)) for name in (ERROR, ITEMS))
    beside = "" if error is None else f" (s.e. {error:.{DIGITS[measure]}f}, {items:,.0f} items)"
    return _estimate(values, measure) + beside


def _against(results: Sequence[Result], baseline: str, measures: Sequence[str]) -> str:
    differences = {
        arm.name: [difference(results, _TESTED, arm.name, _TESTED, baseline, measure) for measure in measures]
        for arm in study.ARMS
        if arm.name != baseline
    }
    whole = {
        name: [one for one in of_measures if one is not None]
        for name, of_measures in differences.items()
        if None not in of_measures
    }
    if not whole:
        return "Nothing yet: that takes two seeds of both."
    p_values = iter(holm([one.p_value for of_measures in whole.values() for one in of_measures]))
    rows = [
        [name, *(_shown(one, m, next(p_values)) for one, m in zip(of_measures, measures, strict=True))]
        for name, of_measures in whole.items()
    ]
    return (
        _table(["arm", *measures], rows)
        + "\n\nDifference [interval], p of the paired t test after Holm's correction over this table."
    )


def _factors(results: Sequence[Result]) -> str:
    rows = []
    for factor in (None, *study.FACTORS):
        variant = factor.name if factor else None
        teachers = [r for r in results if (r.arm, r.variant) == (TEACHER, variant)]
        with_baseline = study.is_wanted(factor, study.FACTOR_BASELINE)
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
        return "Nothing yet."
    against = f"{study.FACTOR_BASELINE}: {_FIRST}, {_LEXICAL}"
    header = ["changed", "teacher's perplexity", GEOMETRY, against, "arm", *ON_TEXT[:3]]
    return (
        f"Differences to {study.FACTOR_BASELINE} by seed, with its weights tuned above and a sense weight of "
        f"{study.FACTOR_SENSE_WEIGHT:g}, the paper's, since those that tuning chose are too small to show anything. "
        f"Intervals are not corrected for their number: leads. {GEOMETRY} is what `dskd senses geometry` says of the "
        "teacher: of pairs of a synonym and an antonym of one word, in how many the synonym is nearer.\n\n"
        + _table(header, rows)
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
        wanted = len(study.FACTOR_SEEDS) * sum(study.is_wanted(factor, arm) for arm in study.FACTOR_ARMS)
        if done < wanted:
            lines.append(f"- {variant or 'nothing changed but the sense weight'}: {done} of {wanted} trainings")
    return "\n".join(lines) or "All that the study asks for was run."


def difference(
    results: Sequence[Result], trained: Trained, name: str, other_trained: Trained, other: str, measure: str
) -> Difference | None:
    """Returns the difference of one arm to another over the seeds that both have; None with fewer than two seeds."""

    def by_seed(where: Trained, name: str) -> dict[str, list[float]]:
        return {
            str(r.seed): [r.measures[measure]]
            for r in results
            if (r.stage, r.variant, r.arm) == (*where, name) and measure in r.measures
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
