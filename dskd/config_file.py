"""Reading a configuration: one YAML file, and `section.key=value` overrides.

Reading is strict and complete: unknown keys, keys given twice, values of a wrong type or out of range are all reported
at once, each with its line, before anything is loaded. A config never changes after loading.
"""

import difflib
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from dskd.config import Config, Section
from dskd.config.section import EXPANDED
from dskd.config_yaml import load_yaml, read_yaml
from dskd.errors import UserError, listed

# Runs share every artifact up to the shards, so they may differ only in what comes after.
KEYS_A_RUN_MAY_CHANGE = ("loss", "train", "seed")
_VARIABLE = re.compile(r"\$\$|\$(\w+)|\$\{(\w+)\}")
# By pydantic's types of errors.
_EXPECTED = {
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, lays the chosen run's keys and then `section.key=value` overrides over it.

    Raises:
        UserError: with every problem found, each with its file and line or the override it came from.
    """
    path = Path(path)
    data, lines = read_yaml(path)
    problems: list[str] = []
    overridden: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or not all(key.split(".")):
            problems.append(f"{override!r}: an override is section.key=value, for example loss.sense_weight=0")
            continue
        try:
            _set_dotted(changes, key, load_yaml(text)[0])
        except (yaml.YAMLError, UserError, TypeError, RecursionError) as problem:
            problems.append(f"{override!r}: the value is not YAML ({problem})")
            continue
        overridden[key] = override
    merged = _with_run(_merge(data, changes))
    found = _seed_problems(merged, changes)
    merged, run_problems = _apply_run(_with_seeds(merged), changes)
    merged, path_problems = _expand_variables(merged)
    problems += [
        f"{_place(path, lines, overridden, key)}{message}" for key, message in (*found, *run_problems, *path_problems)
    ]
    try:
        config = Config.model_validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        problems += [
            f"{_place(path, lines, overridden, key)}{message}" for key, message in _explain(error.errors(), merged)
        ]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(listed(f"{count} in the configuration", problems))
    return config


def differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, value in `one`, value in `other`) wherever two JSON-like configs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
    elif one != other:
        yield prefix, one, other


def describe() -> str:
    """Every key of a configuration with its type, default and meaning, section by section."""
    return "\n".join(_described(Config, ""))


def _described(model: type[Section], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        key = f"{prefix}{name}"
        if section is not None:
            first, *more = inspect.getdoc(section).split("\n\n")  # type: ignore[union-attr] # every section has one
            yield "\n" + textwrap.fill(first, 118, initial_indent=f"{key}: ", subsequent_indent="    ")
            yield from (textwrap.indent(textwrap.fill(part, 114), "    ") for part in more)
            yield from _described(section, f"{key}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default(), default=list)
        text = f"{field.description or ''} [{default}]"
        yield textwrap.fill(text, 118, initial_indent=f"  {key:<38} ", subsequent_indent=" " * 41)


def _set_dotted(target: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{dotted} is set after a key that it is part of")
        target = child
    target[last] = value


def _merge(base: Any, changes: Any) -> Any:
    """`changes` over `base`; mappings are merged key by key, anything else is replaced."""
    if isinstance(base, dict) and isinstance(changes, dict):
        return {
            key: _merge(base[key], changes[key]) if key in base and key in changes else changes.get(key, base.get(key))
            for key in [*base, *(k for k in changes if k not in base)]
        }
    return changes


def _with_run(merged: dict[str, Any]) -> dict[str, Any]:
    """Where no run is chosen and none is called `dskd`, the first of `runs` is."""
    runs, default = merged.get("runs"), Config.model_fields["run"].default
    if "run" in merged or not isinstance(runs, dict) or not runs or default in runs:
        return merged
    return {**merged, "run": next(iter(runs))}


def _with_seeds(merged: dict[str, Any]) -> dict[str, Any]:
    """Instead of each run one for each of `seeds`: `kd-s0` is `kd` with seed 0. The chosen run's name stands for the
    first of its own. What is no list of different numbers is left as it is, for the check of all keys to find.
    """
    seeds, runs, run = merged.get("seeds"), merged.get("runs") or {}, merged.get("run", "dskd")
    if not seeds or not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        return merged
    if len(set(seeds)) < len(seeds):
        return merged
    if not isinstance(runs, dict) or not all(isinstance(keys, dict) for keys in runs.values()):
        return merged
    expanded = {
        f"{name}-s{seed}": {**keys, "seed": seed}
        for name, keys in (runs or {re.sub(r"-s\d+$", "", str(run)): {}}).items()
        for seed in seeds
    }
    first = f"{run}-s{seeds[0]}"
    return {**merged, "seeds": [], "runs": expanded, "run": first if first in expanded and run not in expanded else run}


def _seed_problems(merged: dict[str, Any], overrides: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, message) of every seed that would take the place of those that `seeds` gives."""
    runs = merged.get("runs")
    if not merged.get("seeds"):
        return []
    own = (
        [name for name, keys in runs.items() if isinstance(keys, dict) and "seed" in keys]
        if isinstance(runs, dict)
        else []
    )
    problems = [
        (f"runs.{name}.seed", "`seeds` trains this run with each of its own; remove this seed, or `seeds`")
        for name in own
    ]
    if "seed" in overrides:
        problems.append(
            ("seed", "the runs of `seeds` would all have this seed; choose one of them with run=NAME-sSEED")
        )
    return problems


def _expand_variables(merged: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Replaces environment variables in every key that is a path; also returns (key, message) of what is not set."""
    problems: list[tuple[str, str]] = []

    def expanded(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [expanded(each, f"{key}.{number}") for number, each in enumerate(value)]
        if not isinstance(value, str):
            return value
        missing = [name for name in _variables(value) if name not in os.environ]
        if missing:
            names = " and ".join(f"${name}" for name in missing)
            problems.append(
                (key, f"{names} is not set in the environment; export it, or write the path ($$ is a dollar sign)")
            )
            return value
        return _VARIABLE.sub(lambda found: os.environ[found[1] or found[2]] if found[1] or found[2] else "$", value)

    def walked(model: type[Section], data: Any, prefix: str) -> Any:
        if not isinstance(data, dict):
            return data
        changed = dict(data)
        for name, field in model.model_fields.items():
            if name not in data:
                continue
            section = _section_of(field.annotation)
            if section is not None:
                changed[name] = walked(section, data[name], f"{prefix}{name}.")
            elif EXPANDED in field.metadata or _mentions_path(field.annotation):
                changed[name] = expanded(data[name], f"{prefix}{name}")
        return changed

    return walked(Config, merged, ""), problems


def _variables(text: str) -> list[str]:
    return [found[1] or found[2] for found in _VARIABLE.finditer(text) if found[1] or found[2]]


def _mentions_path(annotation: Any) -> bool:
    return EXPANDED in getattr(annotation, "__metadata__", ()) or any(map(_mentions_path, get_args(annotation)))


def _apply_run(merged: dict[str, Any], overrides: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Puts the chosen run's keys over the file's, and the command line's over those."""
    runs, run = merged.get("runs"), merged.get("run", "dskd")
    if not runs:
        return merged, []
    if not isinstance(runs, dict) or not all(isinstance(run_keys, dict) for run_keys in runs.values()):
        return merged, [("runs", "expected a mapping from a run's name to the keys in which it differs, like kd: {}")]
    problems = []
    for name, keys in runs.items():
        for key in keys:
            if key not in KEYS_A_RUN_MAY_CHANGE:
                allowed = ", ".join(KEYS_A_RUN_MAY_CHANGE)
                problems.append((f"runs.{name}.{key}", f"a run may differ in {allowed}; the rest is shared"))
        if name != run and not problems:
            problems += [
                (f"runs.{name}.{key}", message)
                for key, message in _check(_merge({k: v for k, v in merged.items() if k != "runs"}, keys))
                if key.split(".")[0] in keys and key not in dict(_check(merged))
            ]
    if run not in runs:
        problems.append(("run", f"{run!r} is none of the runs of this file: {', '.join(runs)}"))
        return merged, problems
    return _merge(_merge(merged, runs[run]), overrides), problems


def _check(data: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        Config.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        return _explain(error.errors(), data)
    return []


def _explain(errors: Sequence[Any], data: dict[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, message) of each of pydantic's errors, in words that say what to do."""
    explained: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for error in errors:
        # A union's members each report; the part of the location that names the member is no key of the file.
        location = [str(part) for part in error["loc"]]
        keys: list[str] = []
        here: Any = data
        for part in location:
            if isinstance(here, dict) and part in here:
                here = here[part]
            elif isinstance(here, list) and part.isdigit() and int(part) < len(here):
                here = here[int(part)]
            elif error["type"] != "missing" or part != location[-1]:
                continue
            keys.append(part)
        key = ".".join(keys)
        if error["type"] == "extra_forbidden":
            message = f"unknown key{_suggestion(location)}"
        elif error["type"] == "missing":
            message = "is missing and has no default"
        elif error["type"] == "value_error":
            message = str(error["ctx"]["error"])
        else:
            message = _expected(error, location)
            found[key] = f", found {json.dumps(error['input'], default=str, ensure_ascii=False)}"
            if error["type"] == "string_type" and isinstance(error["input"], (bool, int, float)):
                found[key] += "; put it in quotes"
        said = explained.setdefault(key, [])
        said.append(message.removeprefix("expected ") if said else message)
    return [(key, f"{', or '.join(messages)}{found.get(key, '')}") for key, messages in explained.items()]


def _expected(error: Any, location: list[str]) -> str:
    """What a value has to be, in YAML's terms and not in those of Python and JSON."""
    kind = error["type"].split("_")[0]
    if kind in ("model", "dict"):
        section = _section(location)
        if section is None:
            return "expected keys, such as NAME: {}"
        name, field = next(iter(section.model_fields.items()))
        value = "VALUE" if field.get_default() is None else str(field.get_default()).lower()
        return f"expected keys, such as {'.'.join([*location, name])}={value}"
    if error["type"] in _EXPECTED:
        return f"expected {_EXPECTED[error['type']]}"
    message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return re.sub("^input should be (?=greater|less)", "expected a number ", message).replace(
        "input should be", "expected"
    )


def _section(location: Sequence[str]) -> type[Section] | None:
    """The section at a dotted key's parts, or None where that is none."""
    model: type[Section] | None = Config
    for part in location:
        field = model.model_fields.get(part) if model else None
        model = _section_of(field.annotation) if field else None
    return model


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a field of this type is, also where it may be null."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _suggestion(location: list[str]) -> str:
    model = _section(location[:-1])
    if model is None:
        return ""
    near = difflib.get_close_matches(location[-1], model.model_fields, n=1)
    parent = "".join(f"{part}." for part in location[:-1])
    return f"; did you mean {parent}{near[0]}?" if near else f"; known here: {', '.join(model.model_fields)}"


def _place(path: Path, lines: dict[str, int], overridden: dict[str, str], key: str) -> str:
    """Where `key` was given: the override, the line of the file, or the line of the section it belongs to."""
    shown = f"{key}: " if key else ""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        is_whole = length == len(parts)
        given = [
            text for name, text in overridden.items() if name == prefix or (is_whole and name.startswith(f"{prefix}."))
        ]
        if given:
            return f"override {given[0]!r}: {shown}"
        if prefix in lines:
            return f"{path}:{lines[prefix]}: {shown}"
    return f"{path}: {shown}"
