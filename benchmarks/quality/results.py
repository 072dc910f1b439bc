"""The results file: one JSON line for each finished training.

A line is appended as soon as its training is measured, so that no result is lost and no training repeated.
"""

import fcntl
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality.arms import ARMS, BY_NAME, CHOSEN_BY, Arm
from benchmarks.quality.measures import BY_TEXT
from benchmarks.quality.settings import Settings
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
    settings: Settings
    value: Any  # of the setting that the arm tunes
    measures: Mapping[str, float]
    steps: int
    tokens: int
    positions: int
    cpu_seconds: float  # of training alone
    date: str
    machine: str
    device: str  # cpu or cuda
    # What it was trained and measured on: the digest of text, teacher and sense dictionary, and facts for the report.
    source: Mapping[str, Any]
    judges: Mapping[str, str]  # {judge: its files}
    length: int = 0  # with the stage "length": tokens of training that were asked for
    values_of: str = ""  # another text, whose values come before those chosen on this one

    @property
    def identity(self) -> tuple[Any, ...]:
        """The fields that identify the training."""
        return self.text, self.stage, self.seed, self.settings

    @property
    def is_of_training(self) -> bool:
        """False for the teacher and the untrained student."""
        return self.arm not in (TEACHER, UNTRAINED)

    @classmethod
    def of_json(cls, line: str) -> "Result":
        """Reads a line of the file. A measure without a value is NaN; a KL without one is infinite: it diverged.

        Raises:
            ValueError, TypeError, AttributeError: when the line is not a result, or lacks a setting.
        """
        found = json.loads(line)
        own = {field.name for field in fields(cls)} - {"length", "values_of"}
        parts = (
            ("it lacks", own, found),
            ("its settings lack", {field.name for field in fields(Settings)}, found.get("settings", {})),
            ("its measures lack", set(BY_TEXT), found.get("measures", {})),
            ("its source lacks", {"digest", "teacher", "tokens"}, found.get("source", {})),
        )
        for lack, wanted, part in parts:
            if missing := wanted - part.keys():
                raise ValueError(f"{lack} {', '.join(sorted(missing))}")
        values = {name: math.nan if value is None else float(value) for name, value in found["measures"].items()}
        if math.isnan(values["kl"]):
            values["kl"] = math.inf
        return cls(**found | {"settings": Settings(**found["settings"]), "measures": values})

    def to_json(self) -> str:
        """Returns the line of the file."""
        measures = {name: value if math.isfinite(value) else None for name, value in self.measures.items()}
        return json.dumps(asdict(self) | {"measures": measures}, sort_keys=True, allow_nan=False)


def read_results(path: Path) -> list[Result]:
    """Returns the results so far, or [] if there is no file.

    A last line that was cut off by an interruption is ignored.

    Raises:
        UserError: when the file cannot be read, or a line is not a result of the study.
    """
    if not path.exists():
        return []
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: this is not a file of results ({error})") from None
    if _is_whole(last):
        lines.append(last)
    results: dict[tuple[Any, ...], Result] = {}
    for number, line in enumerate(lines, start=1):
        try:
            result = Result.of_json(line)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{number}: this is not a result of the study ({error}); remove the line") from None
        key = result.identity, "" if result.is_of_training else result.arm
        if key in results and not result.is_of_training:  # measured again, because there were more judges
            before = results[key]
            measures, judges = {**before.measures, **result.measures}, {**before.judges, **result.judges}
            result = replace(result, measures=measures, judges=judges)
        results[key] = result  # a training that is there twice counts once
    return list(results.values())


def _is_whole(line: str | bytes) -> bool:
    """Returns True for JSON, False for the beginning of it and for nothing."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def require_same_source(results: Iterable[Result], path: Path, text: str, source: Mapping[str, Any]) -> None:
    """Checks that a text's results have this source.

    Raises:
        UserError: when some are of another text, teacher or sense dictionary.
    """
    for result in results:
        if result.text == text and result.source["digest"] != source["digest"]:
            raise UserError(
                f"--results {path}: its results of the text {text!r} are of another text, teacher or sense dictionary; "
                "give this text a name of its own with --name, or another file with --results"
            )


def require_same_judges(results: Iterable[Result], path: Path, text: str, judges: Mapping[str, str]) -> None:
    """Checks that a text's results were measured by these judges, if by any.

    Raises:
        UserError: when some have other files.
    """
    for result in results:
        for name in judges.keys() & result.judges.keys():
            if result.text == text and result.judges[name] != judges[name]:
                raise UserError(
                    f"--results {path}: in its results of the text {text!r}, {name} are from {result.judges[name]}, "
                    f"now from {judges[name]}; name the same files, or another file with --results"
                )


def append_result(path: Path, result: Result) -> None:
    """Appends a result, in the place of a line that was cut off. Other processes may do this at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        stream.seek(0)
        before = stream.read()
        whole = before.rfind(b"\n") + 1
        if _is_whole(before[whole:]):
            stream.write(b"\n")
        else:
            stream.truncate(whole)
        stream.write(result.to_json().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def choose(results: Iterable[Result], text: str, arm: Arm, chosen: Mapping[str, Any]) -> Any:
    """Returns the value of an arm with the lowest mean KL on the validation part; None while a trial is missing."""
    tried = {
        result.settings: result.measures[CHOSEN_BY]
        for result in results
        if (result.text, result.stage) == (text, "tune") and result.is_of_training
    }
    found = {}
    for value in arm.values(chosen):
        settings = arm.settings(chosen, value)
        if settings not in tried:
            return None
        found[value] = tried[settings]
    return min(found, key=lambda value: found[value])


def chosen_values(
    results: Sequence[Result], text: str, names: Collection[str] = frozenset(BY_NAME), values_of: str = ""
) -> dict[str, Any]:
    """Returns {arm: its value} of those arms in `names` that are tuned, with all that they build on; None where nothing
    is tuned. Values that were chosen on the text `values_of` come before those of `text`.
    """
    chosen: dict[str, Any] = chosen_values(results, values_of, names) if values_of else {}
    for arm in ARMS:
        if arm.name in chosen:
            continue
        if arm.name in names and (arm.based_on is None or arm.based_on in chosen):
            best = choose(results, text, arm, chosen)
            if arm.tuned is None or best is not None:
                chosen[arm.name] = best
    return chosen


def settings_of_length(settings: Settings, length: int, tokens: int) -> Settings:
    """Returns the settings of a training on `length` tokens of a text of `tokens`, if all of it takes `settings`."""
    return replace(settings, epochs=round(settings.epochs * length / tokens, 4))


def results_by_arm(results: Sequence[Result], text: str, names: Collection[str] = ()) -> list[Result]:
    """Returns a text's results, those of trainings once for each arm that has their settings by now, in its name.

    Arms share a training if their settings are equal. An arm's settings change when an arm that it builds on, or its
    own trials, were tuned again with other values; trainings with the former ones belong to no arm. Looks belong to
    arms that are tested, to the one that they were made for, and to those in `names`. Results of tuning stay as they
    are.
    """
    tested = {}
    for values_of in {result.values_of for result in results if result.text == text}:
        chosen = chosen_values(results, text, values_of=values_of)
        tested[values_of] = {
            arm.name: arm.settings(chosen, chosen[arm.name]) for arm in ARMS if arm.tested and arm.name in chosen
        }

    def arms_of(result: Result) -> list[str]:
        if result.stage == "look":
            looked_at = (arm for arm in ARMS if arm.tested or arm.name in (result.arm, *names))
            return [arm.name for arm in looked_at if arm.look_settings() == result.settings]
        found = tested[result.values_of].items()
        if result.stage == "length":
            tokens = result.source["tokens"]
            found = {name: settings_of_length(now, result.length, tokens) for name, now in found}.items()
        return [name for name, settings in found if settings == result.settings]

    named = []
    for result in results:
        if result.text == text:
            if result.stage == "tune" or not result.is_of_training:
                named.append(result)
            else:
                named += [replace(result, arm=name) for name in arms_of(result)]
    return named
