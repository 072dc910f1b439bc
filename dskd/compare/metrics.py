"""Metrics of runs from the tracking server: last and best values, and the histories of training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dskd.config import Config
from dskd.evaluation import held_out_text
from dskd.losses import terms
from dskd.tracking import TrackedRun, read_histories

EVALUATED, TRAINED, COVERAGE = "eval/", "train/", "coverage/"
SPEEDS = ("speed/tokens_per_s", "speed/step_s")
COST = "cost/device_hours"
CURVES = tuple(terms.curve_titles())  # shown first, in this order
# Metrics of training that are not terms of the loss: smaller is not better, and the last value tells nothing.
_NOT_LOSSES = (
    *("train/grad_norm", "train/learning_rate"),
    *(term.metric for term in terms.TERMS if term.kind == "indicator"),
)
_DIVERGED = 1e30  # values from here on count as infinite: servers store infinity as their largest number
History = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Best:
    """The best value of a run's metric, and its step."""

    value: float
    step: int


def read_metrics(
    config: Config, runs: Sequence[TrackedRun], *, with_measures: bool
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Best]], dict[str, dict[str, History]]]:
    """Returns final values, best values, and the histories of training, each as {metric: {run id: …}}.

    `with_measures` includes the measures of evaluations.
    """
    final: dict[str, dict[str, float]] = {}
    best: dict[str, dict[str, Best]] = {}
    histories: dict[str, dict[str, History]] = {}
    smaller_is_better = {f"{EVALUATED}{measure.name}": measure.lower_is_better for measure in held_out_text.MEASURES}
    prefixes = (TRAINED, COVERAGE, COST, *SPEEDS, *((EVALUATED,) if with_measures else ()))
    for run in runs:
        metrics = {m: value for m, value in run.metrics.items() if m.startswith(prefixes) and m not in _NOT_LOSSES}
        smaller_is_better |= {metric: True for metric in metrics if metric.startswith(TRAINED)}
        with_history = [metric for metric in metrics if metric in smaller_is_better or metric in SPEEDS]
        points_of = read_histories(config, run.run_id, with_history)
        for metric, last in metrics.items():
            # NaN is dropped as well, because it is not smaller than anything.
            points = [(step, value) for step, value in points_of.get(metric, ()) if abs(value) < _DIVERGED]
            # The final speed is the median step: single steps vary, and the first step after each start is slow.
            is_speed = metric in SPEEDS and points
            final.setdefault(metric, {})[run.run_id] = float(np.median([v for _, v in points])) if is_speed else last
            if metric in smaller_is_better and points:
                choose = min if smaller_is_better[metric] else max
                step, value = choose(points, key=lambda point: point[1])
                best.setdefault(metric, {})[run.run_id] = Best(value, step)
            if metric.startswith(TRAINED):
                histories.setdefault(metric, {})[run.run_id] = points
    return final, best, histories
