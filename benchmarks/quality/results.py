"""The results file: one JSON line for each finished training.

A line is appended as soon as its training is measured, so that no result is lost and no training repeated.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality.study import BY_NAME, CHOSEN_BY, Arm
from dskd.errors import UserError

Stage = Literal["tune", "test", "factor"]
# Names in the field `arm` of results that are not from a training.
TEACHER = "teacher"
STUDENT = "student"  # the untrained student, as it was cut
CHANCE = "chance"  # the expected scores of guessing
LETTERS = "letters"  # the scores of the text's letters alone (dskd.evaluation.lexical.surface)
REFERENCES = (CHANCE, LETTERS, STUDENT, TEACHER)
_OF_TRAININGS = (CHOSEN_BY, "lexical_perplexity")  # measures that the report needs from every training


@dataclass(frozen=True)
class Result:
    """The result of one training."""

    stage: Stage
    arm: str
    seed: int
    variant: str | None  # the factor that was changed
    keys: Mapping[str, Any]  # the keys in which it differs from study.yaml and its variant
    value: float | None  # the value of the key that the arm tunes
    measures: Mapping[str, float]
    shards: str  # digest of the training shards
    seconds: float
    date: str
    machine: str

    @property
    def name(self) -> tuple[Any, ...]:
        """The fields that identify the training."""
        return self.stage, self.arm, self.seed, self.variant, json.dumps(dict(self.keys), sort_keys=True), self.shards


def read_results(path: Path) -> list[Result]:
    """Returns the results so far, or [] if there is no file.

    A last line without a line break was left by an interruption and is ignored.

    Raises:
        UserError: when the file cannot be read, or a line is not a result of the study.
    """
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: this is no file of results ({error})") from None
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            result = Result(**json.loads(line))
            for measure in _OF_TRAININGS if result.arm in BY_NAME else ():
                if not isinstance(result.measures, dict) or not isinstance(result.measures.get(measure), int | float):
                    raise ValueError(f"its measures have no {measure}")
            results.append(result)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: this is no result of the study ({error}); remove the line") from None
    return results


def append_result(path: Path, result: Result) -> None:
    """Appends a result after the last complete line. Other processes may do the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        stream.seek(0)
        whole = stream.read().rfind(b"\n") + 1
        stream.truncate(whole)
        stream.write(json.dumps(asdict(result), sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def choose(results: Iterable[Result], arm: Arm) -> float | None:
    """Returns the trial of an arm with the lowest mean perplexity on the validation part.

    Returns None while a trial is missing, and the only value of an arm that is not tuned.
    """
    if not arm.is_tuned:
        return arm.trials[0]
    by_value: dict[float, list[float]] = {}
    for result in results:
        if result.stage == "tune" and result.arm == arm.name and result.value is not None:
            by_value.setdefault(result.value, []).append(result.measures[CHOSEN_BY])
    if any(value not in by_value for value in arm.trials):
        return None
    return min(arm.trials, key=lambda value: sum(by_value[value]) / len(by_value[value]))
