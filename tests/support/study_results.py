"""Results of the study that no training had, for tests of its plan and its report."""

import dataclasses
import functools

from benchmarks.quality.arms import BY_NAME, TUNING_SEED
from benchmarks.quality.measures import BY_TEXT
from benchmarks.quality.results import (
    Result,
    chosen_values,
    settings_of_length,
)
from benchmarks.quality.settings import Settings
from benchmarks.quality.trainings import (
    planned_trainings,
)

MEASURES = dict.fromkeys(BY_TEXT, 50.0)


SOURCE = {"digest": "1", "teacher": "llama", "tokens": 1000, "sequence": 10, "validation": 20, "test": 30}


def result_of(settings=None, kl=2.0, seed=TUNING_SEED, stage="tune", arm="kd", text="toy"):
    measures = MEASURES | {"kl": kl}
    place = "2026-11-30", "here", "cpu", SOURCE, {}
    return Result(text, stage, arm, seed, settings or Settings(), None, measures, 10, 100, 50, 3.0, *place)


@functools.cache
def all_tuned(text="toy"):
    """Results of all trials, of which the last of each arm has the lowest KL."""
    results, kl = [], 9.0
    while True:
        done = {result.identity for result in results}
        planned = (t for t in planned_trainings(results, text, (), ()))
        new = [result_of(t.settings, text=text, arm=t.arm.name) for t in planned]
        new = [result for result in new if result.identity not in done]
        if not new:
            return results
        for result in new:
            kl -= 0.01
            results.append(dataclasses.replace(result, measures=MEASURES | {"kl": kl}))


def chosen_result(arm, kl=2.0, seed=0, stage="test", length=0, **measures):
    """A result of an arm with its chosen value."""
    chosen = chosen_values(all_tuned(), "toy")
    settings = BY_NAME[arm].settings(chosen, chosen[arm])
    if length:
        settings = settings_of_length(settings, length, SOURCE["tokens"])
    result = result_of(settings, kl, seed, stage, arm)
    return dataclasses.replace(result, measures=result.measures | measures, length=length)
