"""Reading a configuration from one YAML file and `section.key=value` overrides.

Reading is strict and complete: unknown keys, duplicate keys, and values of a wrong type or out of range are all
reported at once, each with its line, before anything is loaded. A config never changes after loading.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from dskd.config import Config, Section
from dskd.config.messages import explain, section_of
from dskd.config.runs import apply_run, merge, with_run, with_seeds
from dskd.config.section import EXPANDED
from dskd.config.yaml_file import load_yaml, read_yaml
from dskd.errors import UserError, listed

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on Linux
_VARIABLE = re.compile(r"\$\$|\$(\w+)|\$\{(\w+)\}")


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
            problem = f"{override!r}: an override is section.key=value, for example loss.sense_weight=0"
            problems.append(((True, number), problem))
            continue
        try:
            _set_dotted(changes, key, load_yaml(text)[0])
        except (yaml.YAMLError, UserError, RecursionError) as error:
            problems.append(((True, number), f"{override!r}: the value is not YAML ({error})"))
            continue
        overridden[key] = override
    # Overrides can choose the run, so they are applied before the run's keys are known, and again over those keys.
    merged = with_run(merge(data, changes))
    seed_problems = _seed_problems(merged, data, changes)
    merged, run_problems = apply_run(with_seeds(merged), changes)
    merged, path_problems = _expand_variables(merged)
    found = [*seed_problems, *run_problems, *path_problems]
    try:
        config = Config.model_validate_json(json.dumps(merged, default=str))
    except ValidationError as invalid:
        keys = {key for key, _ in found}
        found += [(key, message) for key, message in explain(invalid.errors(), merged) if key not in keys]
    for key, message in found:
        place, start = _locate(path, lines, overridden, overrides, key)
        problems.append((place, f"{start}{message}"))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
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
    own = (
        [name for name, keys in runs.items() if isinstance(keys, dict) and "seed" in keys]
        if isinstance(runs, dict)
        else []
    )
    problems = [
        (f"runs.{name}.seed", "`seeds` trains this run with each of its own; remove this seed, or `seeds`")
        for name in own
    ]
    if "seed" in data and "seeds" not in overrides:
        problems.append(("seed", "`seeds` trains each run with each of its own; remove this seed, or `seeds`"))
    if "seed" in overrides:
        problems.append(
            ("seed", "the runs of `seeds` would all have this seed; choose one of them with run=NAME-sSEED")
        )
    return problems


def _expand_variables(merged: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Expands environment variables in every path; also returns (key, message) for each path with unset variables."""
    problems: list[tuple[str, str]] = []

    def expand(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [expand(each, f"{key}.{number}") for number, each in enumerate(value)]
        if not isinstance(value, str):
            return value
        missing = [name for name in _variables(value) if name not in os.environ]
        if missing:
            names = " and ".join(f"${name}" for name in missing)
            problems.append(
                (key, f"{names} is not set in the environment; export it, or write the path ($$ is a dollar sign)")
            )
            return value
        if "${" in _VARIABLE.sub("-", value):
            problems.append(
                (
                    key,
                    f"{value!r} has a ${{ without a name and }}: write ${{NAME}}, or $$ for a dollar sign",
                )
            )
            return value
        path = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]] if match[1] or match[2] else "$", value)
        if problem := _path_problem(path):
            problems.append((key, problem))
        return path

    def walk(model: type[Section], data: Any, prefix: str) -> Any:
        if not isinstance(data, dict):
            return data
        changed = dict(data)
        for name, field in model.model_fields.items():
            if name not in data:
                continue
            section = section_of(field.annotation)
            if section is not None:
                changed[name] = walk(section, data[name], f"{prefix}{name}.")
            elif EXPANDED in field.metadata or _contains_path(field.annotation):
                changed[name] = expand(data[name], f"{prefix}{name}")
        return changed

    return walk(Config, merged, ""), problems


def _path_problem(path: str) -> str:
    """Returns why no file can have a path, or an empty text."""
    longest = max(path.split("/"), key=_num_bytes)
    if "\0" in path:
        return "a path cannot contain the character NUL"
    if _num_bytes(longest) > _LONGEST_NAME:
        return f"{longest[:40]!r}… has {_num_bytes(longest):,} bytes, and a file's name has at most {_LONGEST_NAME}"
    if _num_bytes(path) > _LONGEST_PATH:
        return f"{path[:40]!r}… has {_num_bytes(path):,} bytes, and a path has at most {_LONGEST_PATH:,}"
    try:
        Path(path).expanduser()
    except RuntimeError:
        return f"{path!r} begins with the home folder of a user that this machine does not know; write the full path"
    return ""


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _variables(text: str) -> list[str]:
    return [match[1] or match[2] for match in _VARIABLE.finditer(text) if match[1] or match[2]]


def _contains_path(annotation: Any) -> bool:
    return EXPANDED in getattr(annotation, "__metadata__", ()) or any(map(_contains_path, get_args(annotation)))


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
            return (True, overrides.index(matching[0])), f"override {matching[0]!r}: {shown}"
        if prefix in lines:
            return (False, lines[prefix]), f"{path}:{lines[prefix]}: {shown}"
    return (False, 0), f"{path}: {shown}"
