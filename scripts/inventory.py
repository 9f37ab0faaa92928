"""Everything that somebody outside may rely on, one line each: ``python scripts/inventory.py >FILE``.

Take one before a change that is meant to change no behaviour and one after it: ``diff`` of both is what was renamed or
lost. Lines begin with their kind: ``api`` (names, signatures), ``setting`` (with default), ``option`` and ``exit`` (of
the commands), ``environment``, ``header``, ``metric``, ``message`` (fields on the wire), ``error`` (kinds that users
meet) and, with ``--tests``, ``test`` (ids).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pdtransport", "kernels", "launch")
COMMANDS = {
    "pdlaunch": "pdtransport.launch.cli",
    "pdpool": "pdtransport.pool.cli",
    "pdrouter": "pdtransport.router.cli",
}
SETTINGS = {
    "pdtransport": ("pdtransport.settings", "Settings"),
    "pdpool": ("pdtransport.pool.settings", "PoolSettings"),
    "pdrouter": ("pdtransport.router.settings", "RouterSettings"),
    "topology": ("pdtransport.launch.topology", "Topology"),
}
MESSAGES = ("pdtransport.protocol.messages", "pdtransport.pool.messages")
HEADER = re.compile(r"x-pd-[a-z-]+", re.IGNORECASE)
METRIC = re.compile(r"(?:vllm:)?pd(?:transport|router|pool)_[a-z0-9_]+")
VARIABLE = re.compile(r"(?:PD[A-Z]*|VLLM|UCX|XDG|CUDA)_[A-Z0-9_]+")


def api() -> Iterator[str]:
    package = importlib.import_module("pdtransport")
    for name in sorted(package.__all__):
        thing = getattr(package, name)
        yield f"api {name}{_signature(thing)}"
        if inspect.isclass(thing) and not issubclass(thing, BaseModel):
            for member, value in sorted(vars(thing).items()):
                if not member.startswith("_") or member in ("__enter__", "__aenter__", "__await__", "__iter__"):
                    yield f"api {name}.{member}{_signature(getattr(value, '__func__', value))}"


def _signature(thing: Any) -> str:
    try:
        return str(inspect.signature(thing)) if callable(thing) else ""
    except ValueError:
        return ""


def settings() -> Iterator[str]:
    for name, (module, model) in SETTINGS.items():
        yield from _fields(name, getattr(importlib.import_module(module), model), set())


def _fields(path: str, model: type[BaseModel], above: set[type[BaseModel]]) -> Iterator[str]:
    for name, field in sorted(model.model_fields.items()):
        nested = [each for each in _models(field.annotation) if each not in above]
        for each in nested:
            yield from _fields(f"{path}.{name}", each, above | {model})
        if not nested:
            default = field.get_default(call_default_factory=not field.default_factory_takes_validated_data)
            shown = "(required)" if default is PydanticUndefined else repr(default)
            yield f"setting {path}.{name} = {shown}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def options() -> Iterator[str]:
    """What ``--help`` of each command and of its verbs names: options, and statuses that they exit with."""
    for command, module in COMMANDS.items():
        yield from _options(command, module)


def _options(command: str, module: str, *verbs: str) -> Iterator[str]:
    told = _help(module, *verbs)
    for flag in sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", told))):
        yield f"option {' '.join((command, *verbs))} {flag}"
    for status in re.findall(r"^  (\d+)  +(.+)$", told, re.MULTILINE):
        yield f"exit {command} {': '.join(status)}"
    for verb in re.findall(r"^    ([a-z]+)(?: |$)", told, re.MULTILINE):
        yield from _options(command, module, *verbs, verb)


def _help(module: str, *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*words, "--help"])
    return out.getvalue()


def words() -> Iterator[str]:
    """Strings of the source that are names outside: headers, metrics, variables of the environment."""
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            tree = ast.parse(path.read_text())
            documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                    yield from (f"header {found.lower()}" for found in HEADER.findall(node.value))
                    yield from (f"metric {found}" for found in METRIC.findall(node.value))
                    yield from (f"environment {found}" for found in VARIABLE.findall(node.value))


def messages() -> Iterator[str]:
    for module in MESSAGES:
        names = importlib.import_module(module)
        room = module.split(".")[1]
        yield from (f"message {room} {key} = {value}" for key, value in vars(names).items() if key.endswith("_VERSION"))
        for name, message in vars(names).items():
            if inspect.isclass(message) and issubclass(message, BaseModel) and message.__module__ == module:
                fields = ", ".join(f"{field}: {_kind(info.annotation)}" for field, info in message.model_fields.items())
                yield f"message {room} {name}({fields})"


def _kind(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation)) if inspect.isclass(annotation) else str(annotation)


def errors() -> Iterator[str]:
    module = importlib.import_module("pdtransport.errors")
    for name, thing in vars(module).items():
        if inspect.isclass(thing) and issubclass(thing, Exception):
            yield f"error {name}({', '.join(base.__name__ for base in thing.__bases__)})"


def tests() -> Iterator[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:schemathesis"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    yield from (f"test {line}" for line in listed.splitlines() if "::" in line)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python scripts/inventory.py", description=__doc__)
    parser.add_argument("--tests", action="store_true", help="ids of all tests, too")
    args = parser.parse_args()
    found = {*api(), *settings(), *options(), *words(), *messages(), *errors()}
    if args.tests:
        found |= {*tests()}
    print("\n".join(sorted(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
