"""Reading a configuration from one YAML file and `section.key=value` overrides.

Reading is strict and complete: unknown keys, duplicate keys, and values of a wrong type or out of range are all
reported at once, each with its line, before anything is loaded. A config never changes after loading.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dskd.config import Config
from dskd.config.messages import KEYS_WITH_SECRETS, explain
from dskd.config.runs import apply_run, merge, with_run, with_seeds
from dskd.config.yaml_file import load_yaml, read_yaml
from dskd.errors import UserError, counted, listed


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, and applies first the chosen run's keys and then the `section.key=value` overrides.

    Raises:
        UserError: when anything is wrong; it lists every problem, with its file and line or its override.
    """
    path = Path(path)
    data, lines = read_yaml(path)
    problems: list[tuple[tuple[bool, int], str]] = []  # with the place of each, by which they are listed
    overridden: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for number, override in enumerate(overrides):
        key, equals, text = override.partition("=")
        if not equals or not key or not all(key.split(".")):
            problem = f"{_shown_override(override)}: an override is section.key=value, for example loss.sense_weight=0"
            problems.append(((True, number), problem))
            continue
        try:
            _set_dotted(changes, key, load_yaml(text)[0])
        except (yaml.YAMLError, UserError, RecursionError) as error:
            shown = _shown_override(override)
            reason = f" ({error})" if shown == repr(override) else "; put it in quotes"  # the error quotes the value
            problems.append(((True, number), f"{shown}: the value is not YAML{reason}"))
            continue
        overridden[key] = override
    # Overrides can choose the run, so they are applied before the run's keys are known, and again over those keys.
    merged = with_run(merge(data, changes))
    seed_problems = _seed_problems(merged, data, changes)
    merged, run_problems = apply_run(with_seeds(merged), changes)
    messages = [*seed_problems, *run_problems]
    try:
        config = Config.model_validate_json(json.dumps(merged, default=str))
    except ValidationError as invalid:
        keys = {key for key, _ in messages}
        messages += [(key, message) for key, message in explain(invalid.errors(), merged) if key not in keys]
    for key, message in messages:
        location, start = _locate(path, lines, overridden, overrides, key)
        problems.append((location, f"{start}{message}"))
    if problems:
        count = counted(len(problems), "problem")
        texts = [text for _, text in sorted(problems, key=lambda problem: problem[0])]
        raise UserError(listed(f"{count} in the configuration", texts))
    return config


def differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, value in `one`, value in `other`) for each key in which two JSON-like configs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
    elif one != other:
        yield prefix, one, other


def _shown_override(override: str) -> str:
    """Returns an override for a message, in quotes; without its value if that may hold a password or a key."""
    key, equals, text = override.partition("=")
    for name in KEYS_WITH_SECRETS:
        section, _, last = name.rpartition(".")
        if equals and (key == name or (key == section and last in text)):
            return repr(f"{key}=…")
    return repr(f"{key.partition('://')[0]}…") if "://" in override else repr(override)


def _set_dotted(target: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{dotted} is set after a key that it is part of")
        target = child
    target[last] = value


def _seed_problems(merged: dict[str, Any], data: dict[str, Any], overrides: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (key, message) of every seed that would replace the seeds given in `seeds`, or be replaced by them.

    Only `seeds` on the command line may replace the `seed` of a file.
    """
    runs = merged.get("runs")
    if not merged.get("seeds"):
        return []
    named = runs.items() if isinstance(runs, dict) else ()
    replaced = [f"runs.{name}.seed" for name, keys in named if isinstance(keys, dict) and "seed" in keys]
    if "seed" in data and "seeds" not in overrides:
        replaced.append("seed")
    problems = [(key, "`seeds` gives each run seeds of its own; remove this seed, or `seeds`") for key in replaced]
    if "seed" in overrides:
        problems.append(
            ("seed", "the runs of `seeds` would all have this seed; choose one of them with run=NAME-sSEED")
        )
    return problems


def _locate(
    path: Path, lines: dict[str, int], overridden: dict[str, str], overrides: Sequence[str], key: str
) -> tuple[tuple[bool, int], str]:
    """Returns the place of a problem with `key`, to list problems by it, and the beginning of the message.

    The place is (False, line in the file) or (True, number of the override). The message begins with the override that
    set the key, its line in the file, or the line of the nearest section in the file.
    """
    shown = f"{key}: " if key else ""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        is_whole = length == len(parts)
        matching = [
            text for name, text in overridden.items() if name == prefix or (is_whole and name.startswith(f"{prefix}."))
        ]
        if matching:
            return (True, overrides.index(matching[0])), f"override {_shown_override(matching[0])}: {shown}"
        if prefix in lines:
            return (False, lines[prefix]), f"{path}:{lines[prefix]}: {shown}"
    return (False, 0), f"{path}: {shown}"
