"""YAML of configurations: numbers as people write them, keys given once, merged mappings, and the line of each key."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dskd.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """YAML as people mean it: 5e-5 is a number, and a key given twice is a mistake."""


# A copy, so that the loader of every other user of PyYAML stays as it is. YAML 1.1 wants a dot in 5e-5.
_StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Returns the data of a YAML text, and its nodes with merged keys (`<<: *anchor`) in their places.

    Raises:
        UserError: if a key is given twice. One that a merge brings may be given again, which overrides it.
        yaml.YAMLError: if it is no YAML.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_repeated_keys(loader, node, ())
        return loader.construct_document(node), node
    finally:
        loader.dispose()


def _refuse_repeated_keys(loader: _StrictLoader, node: yaml.Node, around: tuple[yaml.Node, ...]) -> None:
    """Looks at keys as they were written: once the loader has merged mappings it cannot tell which were given twice."""
    if node in around:
        raise UserError(f"line {node.start_mark.line + 1}: this contains itself through an alias; write it out")
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key_node, value_node in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if is_merge else loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                remedy = "merge a list, <<: [*ONE, *OTHER]" if is_merge else "keep one of them"
                raise UserError(f"line {line}: {key!r} is given twice (first on line {seen[key]}); {remedy}")
            seen[key] = line
            children.append(value_node)
    for child in children:
        _refuse_repeated_keys(loader, child, (*around, node))


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the data of a config file, and the line of each dotted key.

    Raises:
        UserError: if it cannot be read, or is not a mapping in YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file; the shipped ones are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the config file cannot be read ({error})") from None
    try:
        data, node = load_yaml(text)
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None
    except (yaml.YAMLError, TypeError, RecursionError) as error:  # TypeError: a key that is a list or a mapping
        raise UserError(f"{path}: this is not YAML that a configuration can be: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections like 'teacher:' and 'train:', found {type(data).__name__}")
    # x-NAME holds anchors for the other sections, as in Compose files.
    data = {key: value for key, value in data.items() if not str(key).startswith("x-")}
    return data, dict(_lines_of(node, ""))


def _lines_of(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
            yield key, key_node.start_mark.line + 1
            yield from _lines_of(value_node, key)
