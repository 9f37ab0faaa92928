"""Everything that somebody outside may rely on, one line each: ``python -m scripts.inventory >FILE``.

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

from pdtransport.pool.messages import POOL_VERSION
from pdtransport.protocol.messages import PROTOCOL_VERSION
from scripts.reference import TREES, WIRES, message_lines, sections

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pdtransport", "kernels", "launch")
COMMANDS = {
    "pdlaunch": "pdtransport.launch.cli",
    "pdpool": "pdtransport.pool.cli",
    "pdrouter": "pdtransport.router.cli",
}
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
    """The tables of docs/reference/settings.md: what moves a setting, or changes its type or default, shows here."""
    for tree in TREES:
        for _, lines in sections(tree):
            for row in (line.split(" | ") for line in lines if line.startswith("| `")):
                yield f"setting {tree.title}: {' | '.join(row[:3]).removeprefix('| ')}"


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
    yield f"message control version {PROTOCOL_VERSION}"
    yield f"message pool version {POOL_VERSION}"
    for wire in WIRES:
        for message in wire.messages:
            yield f"message {message.__name__} = {message.model_fields['kind'].default}"
            for line in message_lines(message):
                if line.startswith("| `"):
                    yield f"message {message.__name__}: {line.strip('| ')}"


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
    parser = argparse.ArgumentParser(prog="python -m scripts.inventory", description=__doc__)
    parser.add_argument("--tests", action="store_true", help="ids of all tests, too")
    args = parser.parse_args()
    found = {*api(), *settings(), *options(), *words(), *messages(), *errors()}
    if args.tests:
        found |= {*tests()}
    print("\n".join(sorted(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
