"""Writes docs/reference/settings.md and docs/reference/messages.md from the pydantic models themselves.

``python -m scripts.reference --write`` writes both; ``--check`` exits with 1 if that would change anything. A setting's
description and its section's docstring are its documentation; a message's docstring begins with who sends it.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pdtransport.launch.topology import Topology
from pdtransport.pool import messages as pool
from pdtransport.pool.remote import remote_messages as remote
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.mooncake import MooncakeOptions
from pdtransport.pool.tiers.nixl import NixlOptions
from pdtransport.protocol import messages as control
from pdtransport.router.settings import RouterSettings
from pdtransport.settings import Settings

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
MADE = "Made by `python -m scripts.reference --write` from {source}; a test fails when it is out of date."


class ReferenceGap(Exception):
    """A model says too little of itself; the text names what is missing."""


@dataclass(frozen=True)
class Tree:
    """One tree of settings: a chapter of settings.md."""

    title: str
    intro: str
    model: type[BaseModel]
    path: str = ""


@dataclass(frozen=True)
class Wire:
    """The messages that cross one way: a chapter of messages.md."""

    title: str
    intro: str
    messages: tuple[type[BaseModel], ...]


TREES = (
    Tree(
        "connector",
        "`kv_connector_extra_config` of vLLM's `--kv-transfer-config`, `transport:` of a topology file, and `Settings` "
        "of the Python API.",
        Settings,
    ),
    Tree(
        "pdrouter",
        "Options of `pdrouter` (sections joined by dashes: `--timeouts-connect-s`), `router:` of a topology file, and "
        "`RouterSettings` in Python. See [the router](../router.md).",
        RouterSettings,
    ),
    Tree(
        "pdpool",
        "Options of `pdpool` (sections joined by dashes: `--disk-bytes`), `pool:` of a topology file, and "
        "`PoolSettings` in Python. See [the pool](../pool.md).",
        PoolSettings,
    ),
    Tree("pdpool tier nixl", "`--tier nixl=SIZE`.", NixlOptions, "tiers.nixl.options."),
    Tree("pdpool tier mooncake", "`--tier mooncake=SIZE`.", MooncakeOptions, "tiers.mooncake.options."),
    Tree("topology", "The file that `pdlaunch` reads. See [pdlaunch](../pdlaunch.md).", Topology),
)

WIRES = (
    Wire("Control channel: consumer to producer", "About one transfer.", get_args(control.ConsumerMessage)),
    Wire(
        "Control channel: producer to consumer",
        "About one transfer.",
        (*get_args(control.ProducerMessage), control.BatchHint),
    ),
    Wire("Control channel: apart from transfers", "", get_args(control.ControlMessage)),
    Wire("Pool: client to service", "On the pool's Unix socket.", get_args(pool.FromClient)),
    Wire("Pool: service to client", "", get_args(pool.FromPool)),
    Wire(
        "Remote pool: client to agent",
        "On `remote.listen`, beside all messages of a client of the pool.",
        tuple(each for each in get_args(remote.FromRemote) if each not in get_args(pool.FromClient)),
    ),
    Wire(
        "Remote pool: agent to client",
        "Beside all messages of the pool's service.",
        tuple(each for each in get_args(remote.ToRemote) if each not in get_args(pool.FromPool)),
    ),
)

SENDERS = ("Consumer", "Producer", "Either side", "Worker", "Client", "Service", "Agent")

# -- types and values ----------------------------------------------------------------------------------------------

_UNITS = (
    ("_bytes_s", "bytes/s"), ("bytes", "bytes"), ("_per_s", "per s"), ("_s", "s"), ("_us", "µs"), ("_tokens", "tokens"),
)  # fmt: skip
_SIZES = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))
_PLAIN = {"integer": "integer", "number": "number", "boolean": "boolean", "string": "text"}
_FORMATS = {"path": "path", "password": "secret", "binary": "bytes", "base64url": "bytes"}
_ELSEWHERE = {
    "Code": "[`Code`](../protocol.md#why-a-transfer-failed)",
    "GrantedGroup": "(`first_block`, `blocks`, `head_lo`, `head_hi`)",
}


def unit_of(name: str) -> str:
    return next((unit for ending, unit in _UNITS if name.endswith(ending)), "")


def amount(value: float, unit: str) -> str:
    """A number as a reader wants it: 4 MiB, 2^63, 0.25, 65535."""
    if unit == "bytes" and value:
        for name, power in _SIZES:
            if value % (1 << power) == 0:
                return f"{int(value) >> power} {name}"
    if value >= 1 << 24 and not int(value) & (int(value) - 1):
        return f"2^{int(value).bit_length() - 1}"
    return str(int(value) if value == int(value) else value)


def bounds(schema: dict[str, Any], unit: str, low: str = "minimum", high: str = "maximum") -> str:
    """`0 to 65535`, `> 0, ≤ 60`, or nothing."""
    if low in schema and high in schema:
        ends = {amount(schema[low], unit): None, amount(schema[high], unit): None}
        return " to ".join(ends)
    signs = ((">", f"exclusive{low.capitalize()}"), ("≥", low), ("<", f"exclusive{high.capitalize()}"), ("≤", high))
    return ", ".join(f"{sign} {amount(schema[key], unit)}" for sign, key in signs if key in schema)


def length(schema: dict[str, Any], what: str, unit: str = "") -> str:
    """Bounds of a text's, list's or map's length. (Pydantic calls a list's ``minLength`` where it has a validator.)"""
    sizes = [re.fullmatch("(min|max)(Length|Items|Properties)", key) for key in schema]
    told = bounds({f"{size[1]}imum": schema[size[0]] for size in sizes if size}, unit)
    return f"{told} {what}".strip() if told else ""


def inside(text: str) -> str:
    return f"({text})" if "," in text and not text.startswith("(") else text


def kind(schema: dict[str, Any], unit: str = "") -> str:
    """The type and bounds that a JSON schema states, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _ELSEWHERE.get(name, "section")
    if "anyOf" in schema:
        return " or ".join(kind(each, unit) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum") or [schema["const"]])
    base = schema.get("type")
    if base == "array":
        if "prefixItems" in schema:
            return f"({'; '.join(kind(each) for each in schema['prefixItems'])})"
        return ", ".join(filter(None, (f"list of {inside(kind(schema['items']))}", length(schema, "of them"))))
    if base == "object":
        named = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
        inner = inside(kind(named[0])) if isinstance(named[0], dict) else "values"
        return ", ".join(filter(None, (f"map from name to {inner}", length(schema, "of them"))))
    said = _FORMATS.get(schema.get("format", "")) or _PLAIN.get(str(base), "anything")
    if base != "string":
        limits = bounds(schema, unit)
    elif said == "bytes":
        limits = length(schema, "", "bytes")
    else:
        limits = length(schema, "characters")
    pattern = f"`{schema['pattern']}`" if "pattern" in schema else ""
    return ", ".join(filter(None, (said, limits, pattern)))


def shown(value: Any, unit: str) -> str:
    """A default."""
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "unset"
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (int, float)):
        return amount(value, unit)
    if isinstance(value, (tuple, list)):
        return ", ".join(f"`{each}`" for each in value) or "none"
    text = str(getattr(value, "value", value)).replace(f"pdtransport-{os.getuid()}", "pdtransport-UID")
    return f"`{text}`" if text and value else "none" if isinstance(value, dict) else "empty"


def prose(text: str) -> str:
    """A docstring as Markdown."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", inspect.cleandoc(text)).replace("``", "`")
    quoted = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in quoted)


def table(head: str, rows: list[tuple[str, ...]]) -> list[str]:
    columns = head.split(" | ")
    cells = [" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) for row in rows]
    return [f"| {head} |", "|" + "---|" * len(columns), *(f"| {row} |" for row in cells), ""]


# -- settings ------------------------------------------------------------------------------------------------------


def nested(annotation: Any, ending: str = "") -> tuple[type[BaseModel], str] | None:
    """The section that a field holds, and what follows the field's name in a path: nothing, ``[]`` or ``.NAME``."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation, ending
    origin = getattr(annotation, "__origin__", None)
    ending = {tuple: "[]", dict: ".NAME"}.get(origin, ending)  # type: ignore[arg-type]
    return next(filter(None, (nested(part, ending) for part in getattr(annotation, "__args__", ()))), None)


def default_of(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=not field.default_factory_takes_validated_data)


def described(model: type[BaseModel], name: str) -> str:
    """What a setting does: its description, or its section's docstring.

    Raises:
        ReferenceGap: there is neither.
    """
    field = model.model_fields[name]
    section = nested(field.annotation)
    text = field.description or (section[0].__doc__ if section else None)
    if not text:
        raise ReferenceGap(f"{model.__name__}.{name} has no description")
    return prose(text)


def sections(tree: Tree, model: type[BaseModel] | None = None, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Title and lines of each section of a tree, from ``model`` at ``path`` on down."""
    if model is None:
        model, path = tree.model, tree.path
    holders: dict[tuple[type[BaseModel], str], list[str]] = {}  # names of the fields that hold a section of this tree
    homes = {each.model: each.title for each in TREES}
    for name, field in model.model_fields.items():
        section = nested(field.annotation)
        if section is not None and section[0] not in homes:
            holders.setdefault(section, []).append(name)
    paths = {section: f"{path}{joined(names)}{section[1]}" for section, names in holders.items()}

    properties, rows = model.model_json_schema()["properties"], []
    for name, field in model.model_fields.items():
        unit, section = unit_of(name), nested(field.annotation)
        said = kind(properties[name], unit)
        if section is not None:
            title = homes.get(section[0]) or titled(tree, paths[section])
            said = said.replace("section", f"[section](#{anchor(title)})")
        rows.append((f"`{path}{name}`", said, shown(default_of(field), unit), unit, described(model, name)))
    top = path == tree.path
    intro = tree.intro if top else prose(model.__doc__ or "")
    head = "setting | type and bounds | default | unit | what it does"
    yield tree.title if top else titled(tree, path.removesuffix(".")), [intro, "", *table(head, rows)]
    for section, below in paths.items():
        yield from sections(tree, section[0], f"{below}.")


def joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def titled(tree: Tree, path: str) -> str:
    return f"{tree.title}: `{path}`"


def anchor(title: str) -> str:
    """The anchor that Markdown gives a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def settings_page() -> str:
    lines = [
        "# Every setting",
        "",
        MADE.format(source="the models' fields"),
        "",
        "`a.b` is the key `b` of section `a`; `{a,b}.c` stands for `a.c` and `b.c`, `[]` for each of a list, `NAME` "
        "for a name of your own. *Unset*: the description says what then. Sizes are bytes; 64 KiB is 65536. `pdpool` "
        "and the `pool:` section of a topology file also take `64KiB`, `8GiB` and the like.",
        "",
    ]
    for tree in TREES:
        for title, body in sections(tree):
            lines += [f"{'##' if title == tree.title else '###'} {title}", "", *body]
    return "\n".join(lines)


# -- messages ------------------------------------------------------------------------------------------------------


def sender_and_meaning(message: type[BaseModel]) -> tuple[str, str]:
    """Who sends a message, and what it says.

    Raises:
        ReferenceGap: the docstring does not begin with the sender and a colon.
    """
    sender, colon, meaning = inspect.cleandoc(message.__doc__ or "").partition(": ")
    if not colon or sender not in SENDERS:
        raise ReferenceGap(f"{message.__name__}: its docstring must begin with the sender: {', '.join(SENDERS)}")
    return sender, prose(meaning[0].upper() + meaning[1:])


def message_lines(message: type[BaseModel]) -> list[str]:
    sender, meaning = sender_and_meaning(message)
    properties = message.model_json_schema()["properties"]
    rows = []
    for name, field in message.model_fields.items():
        if name != "kind":
            default = default_of(field)
            needed = "required" if default is PydanticUndefined else "null" if default is None else shown(default, "")
            rows.append((f"`{name}`", kind(properties[name], unit_of(name)), needed))
    lines = [f"### {message.__name__}", "", f"`{message.model_fields['kind'].default}`, from: **{sender.lower()}**", ""]
    return [*lines, meaning, "", *(table("field | type and bounds | default", rows) if rows else [])]


def messages_page() -> str:
    lines = [
        "# Every message",
        "",
        MADE.format(source="the messages' classes"),
        "",
        "A message is a msgpack map: the version `v`, then `kind`, then the fields below, which have these bounds and "
        "no others; a frame out of bounds is refused. `v` is "
        f"{control.PROTOCOL_VERSION} on the control channel, {pool.POOL_VERSION} between a pool and its clients. How "
        "messages follow each other: [the hand-off](../protocol.md), [the pool](../pool.md).",
        "",
    ]
    for wire in WIRES:
        lines += [f"## {wire.title}", "", *([wire.intro, ""] if wire.intro else [])]
        for message in wire.messages:
            lines += message_lines(message)
    return "\n".join(lines)


PAGES = {"settings.md": settings_page, "messages.md": messages_page}


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.reference", description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the pages")
    what.add_argument("--check", action="store_true", help="exit with 1 if a page is not up to date")
    options = parser.parse_args(arguments)
    stale = []
    try:
        for name, page in PAGES.items():
            path, text = folder / name, page()
            if options.write:
                folder.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            elif not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
    except ReferenceGap as gap:
        print(f"reference: {gap}", file=sys.stderr)
        return 2
    if stale:
        print(f"docs/reference: {', '.join(stale)} not up to date: run {parser.prog} --write", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
