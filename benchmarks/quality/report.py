"""The report of the study. All of its figures come from the results file."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import ARMS, BY_NAME, TUNING_SEED, Arm
from benchmarks.quality.measures import DIGITS, MEASURES
from benchmarks.quality.results import TEACHER, UNTRAINED, Result, Stage, choose
from benchmarks.quality.settings import Settings
from dskd.compare.statistics import CONFIDENCE, Difference, Estimate, holm, on_seeds

_LEVEL = round(100 * CONFIDENCE)
_INTRODUCTION = """# What makes a good student, and do senses help?

{when}.

`python -m benchmarks.quality --report` wrote this page from `results.jsonl`; the study is not finished, and the same
program continues it. [toys.md](toys.md) summarises an earlier study on toy models, whose advice did not carry over to
a real one.

Students are cut from SmolLM2-135M-Instruct (30 layers, of which they keep 15), trained on stored states in plain torch
with the loss of `dskd`, and measured against the teacher position by position (the measures are defined in
`measures.py`, the arms in `arms.py`). An arm's value is the one with the lowest KL to the teacher on one part of the
held-out text (seed {tuning}); arms that are tested are then trained with other seeds and measured on the other part.
Intervals are {level} % intervals of Student's t over seeds. Seeds differ in the order of the text, and in the positions
that are drawn. The intervals cover neither other teachers nor other text. Seconds are CPU seconds of training."""


def write_report(results: Sequence[Result], path: Path) -> None:
    """Writes the Markdown of :func:`render` to `path`."""
    path.write_text(render(results), encoding="utf-8")


def render(results: Sequence[Result]) -> str:
    """Returns the whole report as Markdown."""
    dates = sorted({result.date for result in results})
    places = "; ".join(sorted({result.machine for result in results}))
    trained = [result for result in results if result.steps]
    minutes = sum(result.cpu_seconds for result in trained) / 60
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    when = f"{days}; {places}; {len(trained)} trainings, {minutes:.0f} minutes"
    parts = [_INTRODUCTION.format(when=when, tuning=TUNING_SEED, level=_LEVEL)]
    for text in dict.fromkeys(result.text for result in results):
        of_text = [result for result in results if result.text == text]
        parts += [f"## Text: {text}", _references(of_text)]
        stages = {result.stage for result in of_text if result.steps}
        if "tune" in stages:
            parts += ["### What was tried", _tried(of_text)]
        if "look" in stages:
            parts += ["### Looks: untuned, on the validation part", _tested(of_text, "look")]
            parts += ["#### Differences, seed by seed", _differences(of_text, "look")]
        if "test" in stages:
            parts += ["### Test", _tested(of_text, "test"), "#### Differences, seed by seed"]
            parts += [_differences(of_text, "test")]
    return "\n\n".join(parts) + "\n"


def _measured(results: Sequence[Result]) -> list[str]:
    return [name for name in MEASURES if any(name in result.measures for result in results)]


def _references(results: Sequence[Result]) -> str:
    names = _measured(results)
    rows = [
        [f"{result.arm}, {'test' if result.stage == 'test' else 'validation'} part", *_values(result, names)]
        for result in results
        if result.arm in (TEACHER, UNTRAINED)
    ]
    return _table(["reference", *map(_label, names)], rows)


def _tried(results: Sequence[Result]) -> str:
    names = _measured(results)
    by_identity = {result.identity: result for result in results}
    text = results[0].text
    chosen: dict[str, Any] = {}
    rows = []
    for arm in ARMS:
        if arm.based_on is not None and arm.based_on not in chosen:
            continue
        best = choose(results, text, arm, chosen)
        for value in arm.values(chosen):
            result = by_identity.get(_identity(text, arm.settings(chosen, value)))
            if result is not None:
                shown = "" if arm.tuned is None else f"{arm.tuned} {value}"
                mark = " (chosen)" if arm.tuned is not None and best is not None and value == best else ""
                label = arm.name if value == arm.values(chosen)[0] else ""
                rows.append(
                    [label, shown + mark, str(result.steps), f"{result.cpu_seconds:.0f}", *_values(result, names)]
                )
        if arm.tuned is None or best is not None:
            chosen[arm.name] = best
    return _table(["arm", "tried", "steps", "seconds", *map(_label, names)], rows)


def _identity(text: str, settings: Settings) -> tuple[Any, ...]:
    return Result(text, "tune", "", TUNING_SEED, settings.changes, None, {}, 0, 0, 0, 0.0, "", "").identity


def _tested(results: Sequence[Result], stage: Stage) -> str:
    names = _measured(results)
    rows = []
    for arm in ARMS:
        of_arm = [result for result in results if (result.stage, result.arm) == (stage, arm.name)]
        if of_arm:
            estimates = [_estimate([result.measures[name] for result in of_arm], name) for name in names]
            seconds = statistics.mean(result.cpu_seconds for result in of_arm)
            rows.append([arm.name, arm.description, str(len(of_arm)), f"{seconds:.0f}", *estimates])
    return _table(["arm", "", "seeds", "seconds", *map(_label, names)], rows)


def _differences(results: Sequence[Result], stage: Stage) -> str:
    """Returns each tested arm against those that it has to beat, with p-values corrected over the table."""
    names = _measured(results)
    pairs = [(arm, other) for arm in ARMS for other in arm.against]
    found = {
        (arm.name, other): [difference(results, stage, arm, BY_NAME[other], name) for name in names]
        for arm, other in pairs
    }
    found = {key: row for key, row in found.items() if any(each is not None for each in row)}
    tests = [each for row in found.values() for each in row if each is not None]
    corrected = dict(zip(map(id, tests), holm([each.p_value for each in tests]), strict=True))
    rows = [
        [one, other, *(_shown(each, name, corrected) for each, name in zip(row, names, strict=True))]
        for (one, other), row in found.items()
    ]
    note = "Each cell has the difference [interval], and the p-value of the paired t test, corrected by Holm's method."
    return f"{_table(['arm', 'against', *map(_label, names)], rows)}\n\n{note}"


def difference(results: Sequence[Result], stage: Stage, arm: Arm, other: Arm, measure: str) -> Difference | None:
    """Returns the difference of two arms over the seeds that both have; None with fewer than two seeds."""
    first, second = (
        {
            str(result.seed): [result.measures[measure]]
            for result in results
            if (result.stage, result.arm) == (stage, each.name) and measure in result.measures
        }
        for each in (arm, other)
    )
    seeds = first.keys() & second.keys()
    return on_seeds({seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds})


def _values(result: Result, names: Sequence[str]) -> list[str]:
    return [f"{result.measures[name]:,.{DIGITS[name]}f}" if name in result.measures else "" for name in names]


def _estimate(values: Sequence[float], measure: str) -> str:
    estimate, digits = Estimate.of(values), DIGITS[measure]
    interval = "" if estimate.half_width is None else f" ± {estimate.half_width:,.{digits}f}"
    return f"{estimate.mean:,.{digits}f}{interval}"


def _shown(difference: Difference | None, measure: str, corrected: Mapping[int, float]) -> str:
    if difference is None:
        return ""
    digits = DIGITS[measure]
    value, low, high = (f"{x:+,.{digits}f}" for x in (difference.value, difference.low, difference.high))
    return f"{value} [{low}, {high}], p = {corrected[id(difference)]:.2g}"


def _label(measure: str) -> str:
    return measure.replace("_", " ")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
