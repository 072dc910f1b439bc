"""The results file: one JSON line for each finished training.

A line is appended as soon as its training is measured, so that no result is lost and no training repeated.
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality.arms import ARMS, BY_NAME, CHOSEN_BY, Arm
from benchmarks.quality.measures import BY_TEXT
from dskd.errors import UserError

Stage = Literal["look", "tune", "test", "length"]  # length: a test on more text, or less
TEACHER, UNTRAINED = "teacher", "untrained"  # in the field `arm` of results that are not of a training


@dataclass(frozen=True)
class Result:
    """The result of one training."""

    text: str  # the name of the study's text
    stage: Stage
    arm: str
    seed: int
    settings: Mapping[str, Any]  # those that differ from the defaults
    value: Any  # of the setting that the arm tunes
    measures: Mapping[str, float]
    steps: int
    tokens: int
    positions: int
    cpu_seconds: float  # of training alone
    date: str
    machine: str
    length: int = 0  # with the stage "length": tokens of training that were asked for

    @property
    def identity(self) -> tuple[Any, ...]:
        """The fields that identify the training."""
        return self.text, self.stage, self.seed, json.dumps(dict(self.settings), sort_keys=True)


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
            if missing := [name for name in BY_TEXT if not isinstance(result.measures.get(name), int | float)]:
                raise ValueError(f"its measures lack {', '.join(missing)}")
            results.append(result)
        except (ValueError, TypeError, AttributeError) as error:
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


def choose(results: Iterable[Result], text: str, arm: Arm, chosen: Mapping[str, Any]) -> Any:
    """Returns the value of an arm with the lowest mean KL on the validation part; None while a trial is missing."""
    tried = {
        result.identity[3]: result.measures[CHOSEN_BY]
        for result in results
        if (result.text, result.stage) == (text, "tune")
    }
    found = {}
    for value in arm.values(chosen):
        identity = json.dumps(arm.settings(chosen, value).changes, sort_keys=True)
        if identity not in tried:
            return None
        found[value] = tried[identity]
    return min(found, key=lambda value: found[value])


def chosen_values(results: Sequence[Result], text: str, names: Collection[str] = frozenset(BY_NAME)) -> dict[str, Any]:
    """Returns {arm: its value} of those arms in `names` that are tuned, with all that they build on; None where nothing
    is tuned.
    """
    chosen: dict[str, Any] = {}
    for arm in ARMS:
        if arm.name in names and (arm.based_on is None or arm.based_on in chosen):
            best = choose(results, text, arm, chosen)
            if arm.tuned is None or best is not None:
                chosen[arm.name] = best
    return chosen


def without_outdated(results: Sequence[Result], text: str) -> list[Result]:
    """Returns a text's results without trainings of arms that have other settings by now.

    An arm's settings change when an arm that it builds on, or its own trials, were tuned again with other values.
    """
    chosen = chosen_values(results, text)
    expected: dict[tuple[str, str], dict[str, Any]] = {}
    for arm in ARMS:
        expected["look", arm.name] = arm.look_settings().changes
        if arm.name in chosen:
            expected["test", arm.name] = arm.settings(chosen, chosen[arm.name]).changes
            expected["length", arm.name] = _without_epochs(expected["test", arm.name])

    def is_current(result: Result) -> bool:
        if result.stage == "tune" or result.arm not in BY_NAME:
            return True
        settings = _without_epochs(result.settings) if result.stage == "length" else dict(result.settings)
        return settings == expected.get((result.stage, result.arm))

    return [result for result in results if result.text == text and is_current(result)]


def _without_epochs(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "epochs"}
