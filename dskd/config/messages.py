"""Descriptions of a configuration's keys, and messages about mistakes in it."""

import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from dskd.config import Config, Section

# What a value should be, by the type of pydantic's error.
_EXPECTED = {
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "too_short": "a list with at least one entry",  # no list needs more
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}

# Keys whose values are in no message, since they may have a password or a key in them.
KEYS_WITH_SECRETS = ("corpus.server", "tracking.uri")

# What to do about a key that existed in an earlier version.
_REMOVED = {
    "annotation.own_among_antonyms": "this key was removed: students trained with it and without it were equal, and "
    "own rows now never compete for N_i; delete it from the configuration",
}


def describe() -> str:
    """Returns a text with the default and meaning of every key of a configuration, section by section."""
    return "\n".join(_described(Config, ""))


def _described(model: type[Section], prefix: str) -> Iterator[str]:
    # The sections within a section come last, so that its own keys follow its description.
    fields = sorted(model.model_fields.items(), key=lambda item: section_of(item[1].annotation) is not None)
    for name, field in fields:
        section = section_of(field.annotation)
        key = f"{prefix}{name}"
        if section is not None:
            first, *more = inspect.getdoc(section).split("\n\n")  # type: ignore[union-attr] # every section has one
            yield "\n" + textwrap.fill(first, 118, initial_indent=f"{key}: ", subsequent_indent="    ")
            yield from (textwrap.indent(textwrap.fill(part, 114), "    ") for part in more)
            yield from _described(section, f"{key}.")
            continue
        # Some defaults depend on other keys; the one that is shown is for the defaults of these.
        value = field.get_default(call_default_factory=True, validated_data={})
        default = "required" if field.is_required() else json.dumps(value, default=list)
        text = f"{field.description or ''} [{default}]"
        yield textwrap.fill(text, 118, initial_indent=f"  {key:<38} ", subsequent_indent=" " * 41)


def explain(errors: Sequence[Any], data: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (dotted key, message) of pydantic's errors, in words that say what to do.

    The errors of one key make one message. `data` is the configuration as read from the file.
    """
    explained: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for error in errors:
        if error["type"] == "default_factory_not_called":  # a default that depends on another key, which is wrong
            continue
        # Each member of a union reports its own error. The part of the location that names the member is not a key of
        # the file, so keep only parts that lead from `data` to the value, or name a key that is missing.
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
            message = _REMOVED.get(key) or f"unknown key{_suggestion(location)}"
        elif error["type"] == "missing":
            message = "is missing and has no default"
        elif error["type"] == "value_error":
            message = str(error["ctx"]["error"])
        else:
            message = _expected(error, location)
            is_secret = key.startswith(KEYS_WITH_SECRETS)
            value = "another value" if is_secret else json.dumps(error["input"], default=str, ensure_ascii=False)
            values[key] = f", found {value}"
            if error["type"] == "string_type" and isinstance(error["input"], (bool, int, float)):
                values[key] += "; put it in quotes"
        messages = explained.setdefault(key, [])
        messages.append(message.removeprefix("expected ") if messages else message)
    return [(key, f"{', or '.join(messages)}{values.get(key, '')}") for key, messages in explained.items()]


def _expected(error: Any, location: list[str]) -> str:
    """Returns what a value has to be, in the terms of YAML instead of those of Python and JSON."""
    kind = error["type"].split("_")[0]
    if kind in ("model", "dict"):
        section = _section(location)
        if section is None:
            return "expected keys, such as NAME: {}"
        name, field = next(iter(section.model_fields.items()))
        value = "VALUE" if field.is_required() or field.get_default() is None else str(field.get_default()).lower()
        return f"expected keys, such as {'.'.join([*location, name])}={value}"
    if error["type"] in _EXPECTED:
        return f"expected {_EXPECTED[error['type']]}"
    message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return re.sub("^input should be (?=greater|less)", "expected a number ", message).replace(
        "input should be", "expected"
    )


def _section(location: Sequence[str]) -> type[Section] | None:
    """Returns the section at the parts of a dotted key, or None if there is no section at that key."""
    model: type[Section] | None = Config
    for part in location:
        field = model.model_fields.get(part) if model else None
        model = section_of(field.annotation) if field else None
    return model


def section_of(annotation: Any) -> type[Section] | None:
    """Returns the section class in a field's type, which may also allow null; None if the field is not a section."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _suggestion(location: list[str]) -> str:
    model = _section(location[:-1])
    if model is None:
        return ""
    near = difflib.get_close_matches(location[-1], model.model_fields, n=1)
    parent = "".join(f"{part}." for part in location[:-1])
    return f"; did you mean {parent}{near[0]}?" if near else f"; known here: {', '.join(model.model_fields)}"
