"""Reading YAML for configurations: numbers such as 5e-5, no duplicate keys, merged mappings, and each key's line."""

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dskd.errors import UserError

_MERGE_TAG = "tag:yaml.org,2002:merge"
# What YAML can read a key without quotes as, by the name of the type.
_NOT_TEXT = {
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "nothing",
    "dict": "a mapping",
}


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that reads 5e-5 as a number; :func:`load_yaml` refuses duplicate keys."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Returns the data of a node, such as a number or a date. Raises a UserError with the line if it only looks
        like one of these (2024-02-30), or is wrongly tagged as one.
        """
        try:
            data = super().construct_object(node, deep)
            if isinstance(data, int):
                str(data)  # raises ValueError for hexadecimal numbers that could not be written in decimal digits
            return data
        except (ValueError, KeyError, AttributeError, OverflowError) as error:
            text, kind = str(node.value)[:40], node.tag.rpartition(":")[2]
            reason = str(error) if isinstance(error, ValueError) else "it is not one"
            raise UserError(
                f"line {node.start_mark.line + 1}: {text!r} cannot be read as {kind} ({reason}); put it in quotes if "
                "it is text"
            ) from None


# A copy, so that the loader stays the same for other users of PyYAML. In YAML 1.1, 5e-5 without a dot is not a number.
_StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Returns the data of a YAML text, and its nodes, in which merges (`<<: *anchor`) are replaced by the merged keys.

    Raises:
        UserError: if a key occurs twice or is not text, or a value is not what it looks like. A merged key may be
            overridden.
        yaml.YAMLError: if the text is not YAML.
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
    """Replaces `<<` by the keys that it merges, in a node and all nodes below it.

    If a list of mappings is merged, the first mapping that has a key counts, as YAML defines `<<`. This is not left to
    PyYAML, because its versions disagree on that order, and because duplicate keys cannot be found after its merge.
    `around` has the nodes that contain `node`, and `done` the ids of the nodes that are finished, which aliases repeat.

    Raises:
        UserError: if a key is given twice, a node contains itself, or `<<` has something other than mappings.
    """
    if node in around:
        raise UserError(f"line {node.start_mark.line + 1}: this contains itself through an alias; write it out")
    if id(node) in done:  # an alias of a node that is finished
        return
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _merge_mappings(loader, child, (*around, node), done)
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        own: list[tuple[yaml.Node, yaml.Node]] = []
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _MERGE_TAG
            key = key_node.value if is_merge else loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                what = _NOT_TEXT.get(type(key).__name__, f"a {type(key).__name__}")  # such as a date or a list
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "of this line"
                raise UserError(f"line {line}: the key {shown} has to be text, but is {what}; put it in quotes")
            if key in seen:
                remedy = "merge a list, <<: [*ONE, *OTHER]" if is_merge else "keep one of them"
                raise UserError(f"line {line}: {key!r} is given twice (first on line {seen[key]}); {remedy}")
            seen[key] = line
            _merge_mappings(loader, value_node, (*around, node), done)
            if is_merge:
                merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                own.append((key_node, value_node))
        for mapping in merged:
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
    """Returns the data of a config file, and the line of each dotted key. Raises a UserError if the file cannot be
    read, or is not a mapping in YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file; examples are in configs/") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; name a file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the config file cannot be read ({error})") from None
    try:
        data, lines = _parse(text)
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: this is not YAML: {_without_urls(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections like 'teacher:' and 'train:', {_found(data)}")
    # x-NAME holds anchors for the other sections, as in Compose files.
    data = {key: value for key, value in data.items() if not str(key).startswith("x-")}
    return copy.deepcopy(data), lines


def _without_urls(error: Exception) -> str:
    """Returns the message of an error, without the line that it quotes if that has a URL, which may hold a password."""
    mark = getattr(error, "problem_mark", None)
    if "://" not in str(error) or mark is None:
        return str(error)
    return f"{getattr(error, 'problem', '')}\n  line {mark.line + 1}, column {mark.column + 1}"


@functools.lru_cache(maxsize=4)  # a plan that does not fit is computed again with some hundred overrides of one file
def _parse(text: str) -> tuple[Any, dict[str, int]]:
    data, node = load_yaml(text)
    return data, dict(_lines_of(node, ""))


def _found(data: Any) -> str:
    if data is None:
        return "but the file is empty"
    return "found a list" if isinstance(data, list) else f"found {str(data)[:40]!r}"


def _lines_of(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
            yield key, key_node.start_mark.line + 1
            yield from _lines_of(value_node, key)
