"""A bug and its place: the source of one symbol, with one passage replaced."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
_AT_THE_TOP = {"pdtransport.kernels": "kernels", "pdtransport.launch": "launch"}  # installed inside the package


class Stale(Exception):
    """The place of a mutant does not exist any more: its entry in the list needs an eye."""


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Args:
        name: says what the bug does; unique.
        module: a dotted name, or a C source's path in the repository.
        symbol: the class, function or constant in it (``Class.method``, ``function.inner``); of C, a function.
        old, new: the passage, which the symbol's source holds exactly once, and what stands there instead.
        tests: ids of the tests that must find it; they pass without it.
    """

    name: str
    module: str
    symbol: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def is_c(self) -> bool:
        return self.module.endswith((".c", ".h"))

    @property
    def path(self) -> Path:
        if self.is_c:
            return REPO / self.module
        for package, folder in _AT_THE_TOP.items():
            if self.module == package or self.module.startswith(f"{package}."):
                return module_path(folder + self.module.removeprefix(package))
        return module_path(self.module)

    def source(self) -> str:
        """The whole file's text, with the bug in it.

        Raises:
            Stale: the module or the symbol is gone, or the passage is not there exactly once.
        """
        where = f"mutant {self.name}: {self.module}"
        try:
            text = self.path.read_text()
        except OSError:
            raise Stale(f"{where} does not exist") from None
        span = (_c_span if self.is_c else _span)(text, self.symbol)
        if span is None:
            raise Stale(f"{where} has no {self.symbol}")
        first, end = span
        count = text[first:end].count(self.old)
        if count != 1:
            raise Stale(f"{where}: {self.symbol} holds {self.old!r} {count} times, not once")
        changed = text[:first] + text[first:end].replace(self.old, self.new) + text[end:]
        if not self.is_c:
            try:
                compile(changed, str(self.path), "exec")
            except SyntaxError as error:
                raise Stale(f"{where}: with the bug it is no Python: {error}") from None
        return changed


def bugs(module: str, tests: str, *each: tuple[str, str, str, str, str]) -> list[Mutant]:
    """Mutants of one module, as (name, symbol, old, new, test); the tests are of ``tests/unit/test_TESTS.py``."""
    return [
        Mutant(name, module, symbol, old, new, (f"tests/unit/test_{tests}.py::test_{test}",))
        for name, symbol, old, new, test in each
    ]


def module_path(dotted: str) -> Path:
    path = REPO.joinpath(*dotted.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _span(text: str, symbol: str) -> tuple[int, int] | None:
    """Where the symbol's source begins and ends, decorators included; None if there is no such symbol."""
    node: ast.AST = ast.parse(text)
    for name in symbol.split("."):
        found = _child(node, name)
        if found is None:
            return None
        node = found
    assert isinstance(node, ast.stmt)
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)])
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[: first - 1])), sum(map(len, lines[: node.end_lineno]))


def _child(scope: ast.AST, name: str) -> ast.stmt | None:
    """What ``name`` is in this scope; inner scopes are not looked into."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name == name:
                return node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node
        elif isinstance(node, ast.stmt) and (found := _child(node, name)) is not None:
            return found
    return None


def _c_span(text: str, symbol: str) -> tuple[int, int] | None:
    """Of a C function, from its name to the brace at the beginning of a line."""
    found = re.search(rf"^[a-zA-Z][^;#\n]*\b{symbol}\([^;]*?\{{$.*?^\}}", text, re.MULTILINE | re.DOTALL)
    return found.span() if found else None
