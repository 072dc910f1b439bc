"""The results file: one JSON line a finished training, appended when it is measured, so that nothing is lost or done
twice.
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
TEACHER = "teacher"  # arms of what is no training: the teacher itself,
STUDENT = "student"  # the student as it was cut,
CHANCE = "chance"  # guessing,
LETTERS = "letters"  # and what the letters of the text alone give (dskd.evaluation.lexical.surface)
REFERENCES = (CHANCE, LETTERS, STUDENT, TEACHER)
_OF_TRAININGS = (CHOSEN_BY, "lexical_perplexity")  # what the report wants of each; of what is no training, nothing


@dataclass(frozen=True)
class Result:
    """What one training gave."""

    stage: Stage
    arm: str
    seed: int
    variant: str | None  # the factor that was changed
    keys: Mapping[str, Any]  # in which it differs from study.yaml and its variant
    value: float | None  # of the key that the arm tunes
    measures: Mapping[str, float]
    shards: str  # digest of what it was trained on
    seconds: float
    date: str
    machine: str

    @property
    def name(self) -> tuple[Any, ...]:
        """What makes it this training and no other."""
        return self.stage, self.arm, self.seed, self.variant, json.dumps(dict(self.keys), sort_keys=True), self.shards


def read_results(path: Path) -> list[Result]:
    """The results so far; none where there is no file.

    A last line without an end is what an interruption leaves: it is no result.

    Raises:
        UserError: for a line that is none of ours.
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
    """Adds a result, behind the last whole line; others may be doing the same."""
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
    """The trial of an arm with the lowest mean perplexity on the validation part; None before all are done."""
    if not arm.is_tuned:
        return arm.trials[0]
    by_value: dict[float, list[float]] = {}
    for result in results:
        if result.stage == "tune" and result.arm == arm.name and result.value is not None:
            by_value.setdefault(result.value, []).append(result.measures[CHOSEN_BY])
    if any(value not in by_value for value in arm.trials):
        return None
    return min(arm.trials, key=lambda value: sum(by_value[value]) / len(by_value[value]))
