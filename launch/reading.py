"""Reads a topology file and reports errors as ``file:line:column: key.path: what is wrong, what is allowed``."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pdtransport.launch.topology import API_VERSION, Topology
from pdtransport.launch.yamlfile import TopologyError, YamlFile

MAX_PROBLEMS = 20  # problems shown
MAX_SHOWN = 60  # characters of a wrong value
_HIDDEN_KEYS = ("prefill", "decode")  # fields of RouterSettings that pdlaunch sets


def load(path: Path) -> tuple[Topology, YamlFile]:
    """Read and validate ``path``.

    Raises:
        TopologyError: one line per problem.
    """
    file = YamlFile(path)
    if not isinstance(file.data, dict):
        found = "nothing" if file.data is None else f"a {type(file.data).__name__}"
        raise TopologyError(
            file.problem((), f"a topology is a mapping that starts with apiVersion: {API_VERSION}; found {found}")
        )
    try:
        return Topology.model_validate(file.data), file
    except ValidationError as error:
        raise TopologyError("\n".join(_problems(file, error))) from None


def _problems(file: YamlFile, error: ValidationError) -> list[str]:
    details = error.errors(include_url=False)
    meant = {(*keys[:-1], near) for keys in map(_keys, details) if (near := _near(keys))}
    lines = []
    for detail in details:
        keys = _keys(detail)
        if detail["type"] == "missing" and keys in meant:
            continue  # the key is there, but misspelt
        if detail["type"] == "too_short" and any(_keys(other)[:-1] == keys for other in details):
            continue  # wrong items don't count as items
        lines.append((file.place(keys), file.problem(keys, _text(detail, keys))))
    lines.sort(key=lambda item: (item[0].line, item[0].column))
    shown = list(dict.fromkeys(text for _, text in lines))
    if len(shown) > MAX_PROBLEMS:
        shown[MAX_PROBLEMS:] = [f"{file.path}: and {len(shown) - MAX_PROBLEMS} more problems"]
    return shown


def _keys(detail: Any) -> tuple[str | int, ...]:
    """The path in the file that an error refers to."""
    key = detail.get("ctx", {}).get("key")
    return (*detail["loc"], key) if isinstance(key, str) else tuple(detail["loc"])


def _text(detail: Any, keys: Sequence[str | int]) -> str:
    kind, message = detail["type"], str(detail["msg"])
    if kind == "extra_forbidden":
        return _unknown(keys)
    if kind == "missing":
        return f"missing; {_described(keys)}"
    if kind in {"topology", "value_error"}:
        return message.removeprefix("Value error, ")
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return f"expected a mapping{_allowed_text(_allowed(keys))}; found {_shown(detail['input'])}"
    if kind == "string_pattern_mismatch" and list(keys) == ["name"]:
        message = "letters a-z, digits and dashes"
    message = (
        message.replace("Input should be", "must be").replace("a valid integer", "an integer").replace("a valid ", "a ")
    )
    return f"{message}; found {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _unknown(keys: Sequence[str | int]) -> str:
    near = _near(keys)
    hint = f", did you mean {near!r}?" if near else ""
    return f"unknown key{hint}{_allowed_text(_allowed(keys[:-1]))}"


def _near(keys: Sequence[str | int]) -> str | None:
    """The allowed key that an unknown key most likely stands for."""
    allowed = _allowed(keys[:-1])
    if not keys or keys[-1] in allowed:
        return None
    return next(iter(difflib.get_close_matches(str(keys[-1]), allowed, n=1, cutoff=0.6)), None)


def _allowed_text(allowed: Sequence[str]) -> str:
    return f" (allowed: {', '.join(allowed)})" if allowed else ""


def _described(keys: Sequence[str | int]) -> str:
    model = _model_at(keys[:-1])
    field = model.model_fields.get(str(keys[-1])) if model is not None else None
    return (field.description if field is not None and field.description else "this key is required").rstrip(".")


def _allowed(keys: Sequence[str | int]) -> list[str]:
    model = _model_at(keys)
    if model is None:
        return []
    return [name for name in model.model_fields if not (list(keys) == ["router"] and name in _HIDDEN_KEYS)]


def _model_at(keys: Sequence[str | int]) -> type[BaseModel] | None:
    """The model whose fields are the allowed keys below ``keys``."""
    kind: Any = Topology
    for key in keys:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(key))
            kind = _plain(field.annotation) if field is not None else None
        elif typing.get_origin(kind) is dict:
            kind = _plain(typing.get_args(kind)[1])
        else:
            return None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _plain(annotation: Any) -> Any:
    """The annotation without Annotated and without ``| None``."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return _plain(members[0]) if len(members) == 1 else annotation
    return annotation
