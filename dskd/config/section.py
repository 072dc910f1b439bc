"""The base class of the sections of a configuration, and the type of their paths."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

GB = 2**30  # bytes, in all of dskd
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on Linux
_VARIABLE = re.compile(r"\$\$|\$(\w+)|\$\{(\w+)\}")


class Section(BaseModel):
    """A part of the configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns the section as plain JSON-like data."""
        return self.model_dump(mode="json")

    def problems(self) -> Iterator[str]:
        """Yields messages about values that do not fit together; each section has its own."""
        yield from ()

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        if problems := list(self.problems()):
            raise ValueError("; ".join(problems))
        return self

    def changed(self, keys: Sequence[str]) -> list[str]:
        """Returns those of the keys whose values are not the defaults."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]

    def keys_without_use(
        self, name: str, choice: str, keys_of: Mapping[tuple[str, ...], Sequence[str]]
    ) -> Iterator[str]:
        """Yields messages about keys that were changed although the key `choice` has no value that they are for.

        `name` is the name of the section, and `keys_of` has the keys that are for some values of `choice`.
        """
        chosen = getattr(self, choice)
        for values, keys in keys_of.items():
            changed = [f"{name}.{key}" for key in self.changed(keys)]
            if chosen not in values and changed:
                needs, remedy = (
                    ("needs", "it at its default") if len(changed) == 1 else ("need", "them at their defaults")
                )
                yield (
                    f"{' and '.join(changed)} {needs} {choice}: {' or '.join(values)}, and it is {chosen}; leave "
                    f"{remedy}, or change {choice}"
                )


def _expand_variables(value: str) -> str:
    missing = [name for match in _VARIABLE.finditer(value) if (name := match[1] or match[2]) and name not in os.environ]
    if missing:
        names = " and ".join(f"${name}" for name in missing)
        raise ValueError(f"{names} is not set in the environment; export it, or write the path ($$ is a dollar sign)")
    if "${" in _VARIABLE.sub("-", value):
        raise ValueError(f"{value!r} has a ${{ without a name and }}: write ${{NAME}}, or $$ for a dollar sign")
    return _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]] if match[1] or match[2] else "$", value)


def _possible_path(path: str) -> str:
    """Returns the path, after checking that a file can have it."""
    if not path.strip():
        raise ValueError("a path cannot be empty; leave the key out, or write . for the current directory")
    longest = max(path.split("/"), key=_num_bytes)
    if "\0" in path:
        raise ValueError("a path cannot contain the character NUL")
    if _num_bytes(longest) > _LONGEST_NAME:
        raise ValueError(
            f"{longest[:40]!r}… has {_num_bytes(longest):,} bytes, and a file's name has at most {_LONGEST_NAME}"
        )
    if _num_bytes(path) > _LONGEST_PATH:
        raise ValueError(f"{path[:40]!r}… has {_num_bytes(path):,} bytes, and a path has at most {_LONGEST_PATH:,}")
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path!r} begins with the home folder of a user that this machine does not know; write the full path"
        ) from None
    return path


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


# A path in a config file. The environment variables $NAME and ${NAME} in it are expanded.
PathText = Annotated[str, AfterValidator(_expand_variables), AfterValidator(_possible_path)]
