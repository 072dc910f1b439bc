"""The report of the study. All of its figures come from the results file."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import ARMS, BY_NAME, CHOSEN_BY, GROUPS, TUNING_SEED, Arm, time_of_sequence
from benchmarks.quality.measures import BY_TEXT, DIGITS, MEASURES, OUTSIDE, is_at_chance
from benchmarks.quality.results import TEACHER, UNTRAINED, Result, Stage, choose, chosen_values, results_by_arm
from dskd.compare.statistics import CONFIDENCE, Difference, Estimate, holm, on_seeds
from dskd.console import markdown_table

_LEVEL = round(100 * CONFIDENCE)
_INTRODUCTION = """# What makes a good student, and do senses help?

{when}.

`python -m benchmarks.quality --report` wrote this page from `results.jsonl`; the study is not finished, and the same
program continues it. [toys.md](toys.md) summarises an earlier study on toy models, whose advice did not carry over to
a real one.

Students keep {layers} layers of their teacher. They are trained on stored states in plain torch with the loss of
`dskd`, and measured against the teacher position by position (the measures are defined in `measures.py`, the arms in
`arms.py`). An arm's value is the one with the lowest KL to the teacher on one part of the held-out text (seed
{tuning}); arms that are tested are then trained with other seeds and measured on the other part.
Intervals are {level} % intervals of Student's t over seeds. Seeds differ in the order of the text, and in the positions
that are drawn. The intervals cover neither other teachers nor other text. Seconds are CPU seconds of training, on a
GPU those of a clock.

A difference is between an arm and one that it has to beat, seed by seed; it is **bold** if the p-value of its paired
t test, corrected by Holm's method over all differences of the measure, is below {threshold:.0%}.
{at_chance}: the teacher is less than two standard errors above chance, so no differences are shown. For choice and
preference, chance is the untrained student's score. `opposites new` has the pairs that the study's lexicon lacks."""
_ON_LOOKS = (
    "Leads, not results: no difference is bold. The means of a table are over the seeds that all of its arms have."
)
_ON_LENGTHS = (
    "Tokens are those of an arm that reads the text once in its test. Above one times the text it is repeated."
)
_ON_VALUES = "Arms that are tuned on the text `{text}` have the value that was chosen there."
_ON_TRIALS = """Every arm builds on the values that were chosen before it. `batch` and `batch again` are tried at equal
time, as are arms "as long"; all others read as much of the text as the arm that they build on. No arm builds on Muon,
even where it has the lowest KL after equally many steps: its step takes 5.6 times as long as AdamW's."""
_THRESHOLD = 0.05
_AT_CHANCE = "†"
_TRIED = ("kl", "agreement", "perplexity", "lexical_perplexity")


def write_report(results: Sequence[Result], path: Path) -> None:
    """Writes the Markdown of :func:`render` to `path`."""
    path.write_text(render(results), encoding="utf-8")


def render(results: Sequence[Result]) -> str:
    """Returns the whole report as Markdown."""
    dates = sorted({result.date for result in results})
    places = "; ".join(sorted({result.machine for result in results}))
    trained = [result for result in results if result.is_of_training]
    layers = ", ".join(sorted({str(result.settings.layers) for result in results if result.arm != TEACHER}))
    minutes = sum(result.cpu_seconds for result in trained) / 60
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    when = f"{days}; {places}; {len(trained)} trainings, {minutes:.0f} minutes"
    parts = [
        _INTRODUCTION.format(
            layers=layers, when=when, tuning=TUNING_SEED, level=_LEVEL, threshold=_THRESHOLD, at_chance=_AT_CHANCE
        )
    ]
    for text in dict.fromkeys(result.text for result in results):
        of_text = results_by_arm(results, text)
        parts += [
            f"## Text: {text}",
            _about(next(result for result in results if result.text == text)),
            _references(of_text),
        ]
        stages = {result.stage for result in of_text if result.is_of_training}
        if "tune" in stages:
            parts += [
                "### What was tried",
                _ON_TRIALS,
                *_check_of_times(results, text),
                _tried(of_text, _values_elsewhere(results, of_text)),
            ]
        if "look" in stages:
            parts += ["### Looks: untuned, on the validation part", _ON_LOOKS, *_compared(of_text, "look")]
        if "test" in stages:
            others = {result.values_of for result in of_text if result.stage == "test" and result.values_of}
            parts += ["### Test", *(_ON_VALUES.format(text=other) for other in sorted(others))]
            parts += _compared(of_text, "test")
        if "length" in stages:
            parts += ["### Length: the test with more tokens of training, or less", _ON_LENGTHS, *_lengths(of_text)]
    return "\n\n".join(parts) + "\n"


def _about(result: Result) -> str:
    source = result.source
    return (
        f"Teacher: {source['teacher']}. Training text: {source['tokens']:,} tokens in sequences of "
        f"{source['sequence']}. Held-out text: {source['validation']:,} target positions in the validation part, "
        f"{source['test']:,} in the test part."
    )


def _measured(results: Sequence[Result]) -> list[str]:
    return [name for name in MEASURES if any(name in result.measures for result in results)]


def _at_chance(results: Sequence[Result]) -> frozenset[str]:
    """Returns the measures on which the teacher is at chance on any part of the held-out text."""
    of_stage = {(result.arm, result.stage): result.measures for result in results if not result.is_of_training}
    return frozenset(
        name
        for (arm, stage), measures in of_stage.items()
        if arm == TEACHER
        for name in measures
        if is_at_chance(measures, name, of_stage.get((UNTRAINED, stage)))
    )


def _references(results: Sequence[Result]) -> str:
    names = _measured(results)
    latest = {(result.arm, result.stage): result for result in results if result.arm in (TEACHER, UNTRAINED)}
    rows = [
        [f"{arm}, {'test' if stage == 'test' else 'validation'} part", *_values(result, names)]
        for (arm, stage), result in latest.items()
    ]
    return markdown_table(["reference", *_labels(names, _at_chance(results))], rows)


def _values_elsewhere(results: Sequence[Result], of_text: Sequence[Result]) -> dict[str, Any]:
    """Returns the chosen values of the text whose values those of `of_text` build on, if there is one."""
    others = sorted({result.values_of for result in of_text if result.values_of})
    return chosen_values(results, others[0]) if others else {}


def _tried(results: Sequence[Result], known: Mapping[str, Any]) -> str:
    """Returns the table of trials; values that are `known` were not tried on this text."""
    names = [name for name in _TRIED if name in _measured(results)]
    tuned = (result for result in results if result.stage == "tune" and result.is_of_training)
    by_settings = {result.settings: result for result in tuned}
    text = results[0].text
    chosen = dict(known)
    named: set[str] = set()
    rows = []
    for arm in ARMS:
        if arm.name in known or (arm.based_on is not None and arm.based_on not in chosen):
            continue
        best = choose(results, text, arm, chosen)
        for value in arm.values(chosen):
            result = by_settings.get(arm.settings(chosen, value))
            if result is not None:
                shown = "" if arm.tuned is None else f"{arm.tuned} {value}"
                mark = " (chosen)" if arm.tuned is not None and best is not None and value == best else ""
                label = "" if arm.name in named else arm.name
                named.add(arm.name)
                rows.append(
                    [label, shown + mark, str(result.steps), f"{result.cpu_seconds:.0f}", *_values(result, names)]
                )
        if arm.tuned is None or best is not None:
            chosen[arm.name] = best
    return markdown_table(["arm", "tried", "steps", "seconds", *_labels(names)], rows)


def _check_of_times(results: Sequence[Result], text: str) -> list[str]:
    """Returns how the seconds that equal time assumes compare with those of trainings on a CPU."""
    ratios: dict[tuple[int, int], list[float]] = {}
    for result in results:
        settings, is_on_cpu = result.settings, result.device == "cpu"
        if result.text == text and result.cpu_seconds and is_on_cpu and settings.optimizer == "adamw":
            predicted = time_of_sequence(settings) * result.steps * settings.batch_size
            ratios.setdefault((settings.train_layers, settings.batch_size), []).append(predicted / result.cpu_seconds)
    if not ratios:
        return []
    shown = "; ".join(
        f"{layers} × {batch} {statistics.mean(each):.2f}" for (layers, batch), each in sorted(ratios.items())
    )
    return [f"Assumed seconds of arms in equal time, divided by the recorded ones, by trained layers × batch: {shown}."]


def _compared(results: Sequence[Result], stage: Stage) -> list[str]:
    """Returns the arms of a stage, group by group, with their differences from those that they have to beat."""
    of_stage = [result for result in results if result.stage == stage and result.arm in BY_NAME]
    at_chance = _at_chance(results)
    compared = [name for name in _measured(of_stage) if name not in at_chance]
    found = {
        (arm.name, other): [difference(of_stage, stage, arm, BY_NAME[other], name) for name in compared]
        for arm in ARMS
        for other in arm.against
    }
    found = {key: row for key, row in found.items() if any(each is not None for each in row)}
    bold = frozenset[int]() if stage == "look" else _significant(found.values())
    parts = []
    for title, arms in GROUPS.items():
        names = {arm.name for arm in arms}
        of_group = [result for result in of_stage if result.arm in names]
        if not of_group:
            continue
        if stage == "look":
            of_group = _with_shared_seeds(of_group)
        parts += [f"#### {title}", _values_of(of_group, arms, BY_TEXT)]
        rows = [
            [one, other, *(_shown(each, name, bold) for each, name in zip(row, compared, strict=True))]
            for (one, other), row in found.items()
            if one in names
        ]
        if rows:
            parts += ["Differences:", markdown_table(["arm", "against", *_labels(compared)], rows)]
    if outside := [name for name in _measured(of_stage) if name in OUTSIDE]:
        of_all = _with_shared_seeds(of_stage) if stage == "look" else of_stage
        parts += ["#### Outside judges", _values_of(of_all, ARMS, outside, at_chance, is_described=False)]
    return parts


def _with_shared_seeds(results: Sequence[Result]) -> list[Result]:
    """Returns the results with seeds that all arms have, or all results if there is no such seed."""
    seeds: dict[str, set[int]] = {}
    for result in results:
        seeds.setdefault(result.arm, set()).add(result.seed)
    shared = set.intersection(*seeds.values())
    return [result for result in results if result.seed in shared or not shared]


def _lengths(results: Sequence[Result]) -> list[str]:
    """Returns tables of arms × tokens, each with the differences from `kd`."""
    of_stage = [result for result in results if result.stage == "length" and result.arm in BY_NAME]
    lengths = sorted({result.length for result in of_stage})
    arms = [arm for arm in ARMS if any(result.arm == arm.name for result in of_stage)]
    by_length = {length: [result for result in of_stage if result.length == length] for length in lengths}
    parts = []
    for measure in ("kl", "lexical_perplexity"):
        found = {
            arm.name: [difference(by_length[each], "length", arm, BY_NAME["kd"], measure) for each in lengths]
            for arm in arms
            if arm.name != "kd"
        }
        bold = _significant(found.values())
        rows = []
        for arm in arms:
            values = [[r.measures[measure] for r in by_length[each] if r.arm == arm.name] for each in lengths]
            cells = [_estimate(each, measure) if each else "" for each in values]
            differences = [_shown(each, measure, bold) for each in found.get(arm.name, [None] * len(lengths))]
            rows.append([arm.name, *(cell for pair in zip(cells, differences, strict=True) for cell in pair)])
        header = []
        for length in lengths:
            times = length / of_stage[0].source["tokens"]
            header += [f"{_label(measure)}, {length:,} tokens ({times:.2g} × the text)", "against kd"]
        parts.append(markdown_table(["arm", *header], rows))
    return parts


def _significant(rows: Iterable[Sequence[Difference | None]]) -> frozenset[int]:
    """Returns the ids of the differences whose p-value, corrected over each column of the rows, is low enough."""
    found: set[int] = set()
    for column in zip(*rows, strict=True):
        tests = [each for each in column if each is not None]
        corrected = holm([each.p_value for each in tests])
        found |= {
            id(each)
            for each, value in zip(tests, corrected, strict=True)
            if value < _THRESHOLD and each.low < each.high  # two equal differences prove nothing
        }
    return frozenset(found)


def _values_of(
    results: Sequence[Result],
    arms: Sequence[Arm],
    names: Sequence[str],
    at_chance: frozenset[str] = frozenset(),
    *,
    is_described: bool = True,
) -> str:
    rows = []
    for arm in arms:
        of_arm = [result for result in results if result.arm == arm.name]
        if of_arm:
            values = [[result.measures[name] for result in of_arm if name in result.measures] for name in names]
            estimates = [_estimate(each, name) if each else "" for each, name in zip(values, names, strict=True)]
            seconds = statistics.mean(result.cpu_seconds for result in of_arm)
            counts = (len(of_arm), of_arm[0].steps, of_arm[0].tokens)
            described = [arm.description, *(f"{count:,}" for count in counts), f"{seconds:.0f}"] if is_described else []
            rows.append([arm.name, *described, *estimates])
    columns = ["", "seeds", "steps", "tokens", "seconds"] if is_described else []
    header = ["arm", *columns, *_labels(names, at_chance)]
    return markdown_table(header, rows)


def difference(results: Sequence[Result], stage: Stage, arm: Arm, other: Arm, measure: str) -> Difference | None:
    """Returns the difference of two arms over the seeds that both have and in which neither diverged; None with fewer
    than two seeds.
    """
    first, second = (
        {
            str(result.seed): [result.measures[measure]]
            for result in results
            if (result.stage, result.arm) == (stage, each.name)
            and math.isfinite(result.measures.get(measure, math.nan))
        }
        for each in (arm, other)
    )
    seeds = first.keys() & second.keys()
    return on_seeds({seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds})


def _values(result: Result, names: Sequence[str]) -> list[str]:
    return [_estimate([result.measures[name]], name) if name in result.measures else "" for name in names]


def _estimate(values: Sequence[float], measure: str) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged" if measure == CHOSEN_BY and math.inf in values else "–"
    estimate, digits = Estimate.of(values), DIGITS[measure]
    interval = "" if estimate.half_width is None else f" ± {estimate.half_width:,.{digits}f}"
    return f"{estimate.mean:,.{digits}f}{interval}"


def _shown(difference: Difference | None, measure: str, bold: frozenset[int]) -> str:
    if difference is None:
        return ""
    digits = DIGITS[measure]
    text = f"{difference.value:+,.{digits}f} ± {(difference.high - difference.low) / 2:,.{digits}f}"
    return f"**{text}**" if id(difference) in bold else text


def _labels(names: Sequence[str], at_chance: frozenset[str] = frozenset()) -> list[str]:
    return [f"{_label(name)}{' ' + _AT_CHANCE if name in at_chance else ''}" for name in names]


def _label(measure: str) -> str:
    return measure.replace("_", " ")
