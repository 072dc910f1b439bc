"""YAML of configurations: numbers as people write them, keys given once, merged mappings, and the line of each key."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dskd.errors import UserError

_MERGE_TAG = "tag:yaml.org,2002:merge"


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
        _merge_mappings(loader, node, (), set())
        return loader.construct_document(node), node
    finally:
        loader.dispose()


def _merge_mappings(loader: _StrictLoader, node: yaml.Node, around: tuple[yaml.Node, ...], done: set[int]) -> None:
    """Replaces `<<` by the keys it brings, in a node and all below it, and refuses keys that are given twice.

    Of a list of mappings the first that has a key counts, as YAML's definition of `<<` says. PyYAML is not left to do
    it, because its versions disagree on that, and because it cannot tell afterwards which keys were given twice.
    """
    if node in around:
        raise UserError(f"line {node.start_mark.line + 1}: this contains itself through an alias; write it out")
    if id(node) in done:  # an alias of what was read already
        return
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _merge_mappings(loader, child, (*around, node), done)
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        own: list[tuple[yaml.Node, yaml.Node]] = []
        brought: list[yaml.Node] = []
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _MERGE_TAG
            key = key_node.value if is_merge else loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                remedy = "merge a list, <<: [*ONE, *OTHER]" if is_merge else "keep one of them"
                raise UserError(f"line {line}: {key!r} is given twice (first on line {seen[key]}); {remedy}")
            seen[key] = line
            _merge_mappings(loader, value_node, (*around, node), done)
            if is_merge:
                brought = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                own.append((key_node, value_node))
        for mapping in brought:
            if not isinstance(mapping, yaml.MappingNode):
                raise UserError(f"line {seen['<<']}: << takes *NAME of a mapping, or a list of them")
            for key_node, value_node in mapping.value:
                key = loader.construct_object(key_node, deep=True)
                if key not in seen:
                    seen[key] = key_node.start_mark.line + 1
                    own.append((key_node, value_node))
        node.value = own
    done.add(id(node))


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
