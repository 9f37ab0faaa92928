"""Reads a YAML file and remembers the line and column of every value.

Uses the safe loader only. Refuses duplicate keys, keys that are not text, tabs, recursive anchors and anchor bombs.
Also refuses values that YAML 1.1 reads differently than people do: ``21:00`` as 1260, ``no`` as false, ``010`` as 8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pdtransport.errors import SettingsError

MAX_BYTES = 1 << 20  # a topology with thousands of instances is smaller
MAX_SHOWN = 60  # characters of a wrong value
MAX_NODES = 100_000  # after expanding anchors: otherwise a file of 1 MB can expand to gigabytes
_CORE = "tag:yaml.org,2002:"
MERGE_TAG = _CORE + "merge"
TEXT_TAG = _CORE + "str"
# Allowed spelling of each scalar type, such that YAML 1.1, YAML 1.2 and people read it the same way.
PLAIN = {
    TEXT_TAG: "(?s:.*)",
    MERGE_TAG: "<<",
    _CORE + "null": "(~|null|Null|NULL)?",
    _CORE + "bool": "true|True|TRUE|false|False|FALSE",
    _CORE + "int": "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    _CORE + "float": r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
COLLECTIONS = (_CORE + "map", _CORE + "seq")
REMEDIES = {
    "bool": "write true or false, or ",
    "int": "write the number in decimal digits, or ",
    "float": "write the number in decimal digits, or ",
}
# Types that the loader knows but that a topology does not need.
OTHER_TYPES = ("timestamp", "value", "binary", "set", "omap", "pairs")


class TopologyError(SettingsError):
    """A topology file can't be used. One line per problem: ``file:line:column: key.path: what is wrong``."""


@dataclass(frozen=True)
class YamlPosition:
    line: int
    column: int


class YamlFile:
    """A parsed YAML file. ``data`` is plain Python; :meth:`place` gives the position of a key path.

    Raises:
        TopologyError: unreadable, too large, or not well-formed; the text names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root, self.data = _load(path)

    def place(self, keys: Sequence[str | int]) -> YamlPosition:
        """Position of ``keys``, or of its nearest parent that is in the file."""
        node, mark = self._root, self._root.start_mark if self._root is not None else None
        for key in keys:
            found = _child(node, key)
            if found is None:
                break
            mark, node = found
        return YamlPosition(1, 1) if mark is None else YamlPosition(mark.line + 1, mark.column + 1)

    def problem(self, keys: Sequence[str | int], text: str) -> str:
        """``file:line:column: key.path: text``"""
        place = self.place(keys)
        path = ".".join(str(key) for key in keys)
        return f"{self.path}:{place.line}:{place.column}: {path + ': ' if path else ''}{text}"


def _load(path: Path) -> tuple[Any, Any]:
    text = _read(path)
    try:
        return _compose(yaml.SafeLoader(text), path)
    except yaml.MarkedYAMLError as error:
        raise TopologyError(_syntax(path, text, error)) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise TopologyError(f"{path}:{line}: not YAML text: {error.reason}") from None
    except RecursionError:
        raise TopologyError(f"{path}:1:1: nested too deeply to be a topology") from None
    except (ValueError, OverflowError) as error:  # a scalar such as 2024-99-99, which is invalid for its YAML type
        raise TopologyError(f"{path}: a value can't be read: {error}; quote it if it is text") from None


def _compose(loader: yaml.SafeLoader, path: Path) -> tuple[Any, Any]:
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        _check(root, path, (), set(), {})
        # construct_document resolves merge keys (<<) inside the nodes, so that positions are found through them as
        # well.
        return root, loader.construct_document(root)
    finally:
        loader.dispose()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TopologyError(f"{path}: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise TopologyError(f"{path}: larger than {MAX_BYTES} bytes, so it is not a topology file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise TopologyError(f"{path}:{line}: not UTF-8 text") from None


def _syntax(path: Path, text: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(part for part in (error.context, error.problem) if part)
    if mark is None:
        return f"{path}: malformed YAML: {problem}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1] or "'\\t'" in problem:
        problem = "a tab: YAML indents with spaces"
    return f"{path}:{mark.line + 1}:{mark.column + 1}: malformed YAML: {problem}"


def _check(node: Any, path: Path, keys: tuple[str, ...], above: set[int], sizes: dict[int, int]) -> int:
    """Refuse content that would be lost silently, expand too far, or be misread; return the node's expanded size."""
    if id(node) in above:
        raise TopologyError(_at(path, node, "an anchor that contains itself"))
    if id(node) in sizes:
        return sizes[id(node)]
    _check_type(node, path, keys)
    above.add(id(node))
    size = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, path)
        for key, value in node.value:
            size += _check(key, path, keys, above, sizes) + _check(value, path, (*keys, key.value), above, sizes)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, path, (*keys, str(place)), above, sizes) for place, item in enumerate(node.value))
    above.discard(id(node))
    if size > MAX_NODES:
        raise TopologyError(_at(path, node, f"expands to more than {MAX_NODES} values"))
    sizes[id(node)] = size
    return size


def _check_type(node: Any, path: Path, keys: tuple[str, ...]) -> None:
    """Refuse values that YAML 1.1 and people read differently. The loader itself refuses unknown types."""
    kind = node.tag.removeprefix(_CORE)
    if node.tag in COLLECTIONS or not (node.tag in PLAIN or kind in OTHER_TYPES):
        return
    if not isinstance(node, yaml.ScalarNode):
        text = f"!!{kind} is not allowed here: write a plain list or mapping"
    elif node.tag in PLAIN and re.fullmatch(PLAIN[node.tag], node.value):
        return
    else:
        value = " ".join(node.value.split())
        shown = value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 3] + "..."
        text = f"{shown} is {_taken_for(node)} in YAML 1.1: {REMEDIES.get(kind, '')}quote it if it is text"
    where = ".".join(keys)
    raise TopologyError(_at(path, node, f"{where}: {text}" if where else text))


def _taken_for(node: yaml.ScalarNode) -> str:
    """How YAML 1.1 reads a scalar, in a few words."""
    kind = node.tag.removeprefix(_CORE)
    if kind in ("bool", "int", "float"):
        with suppress(yaml.YAMLError, ValueError, OverflowError):
            return str(yaml.safe_load(node.value)).lower()
    return {"timestamp": "a date"}.get(kind, f"of the type !!{kind}")


def _check_keys(node: yaml.MappingNode, path: Path) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == MERGE_TAG:
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != TEXT_TAG:
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise TopologyError(_at(path, key, f"{shown}: keys must be text; write it in quotes"))
        if key.value in first:
            raise TopologyError(_at(path, key, f"{key.value}: this key is already on line {first[key.value]}"))
        first[key.value] = key.start_mark.line + 1


def _at(path: Path, node: Any, text: str) -> str:
    return f"{path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: {text}"


def _child(node: Any, key: str | int) -> tuple[Any, Any] | None:
    """The position of the key (or list item), and the node of its value."""
    if isinstance(node, yaml.MappingNode):
        # The last one counts: merged keys are placed before the mapping's own.
        for name, value in reversed(node.value):
            if name.value == str(key):
                return name.start_mark, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        item = node.value[key]
        return item.start_mark, item
    return None
