"""The list of deliberate bugs keeps up with the code: each has its place and its tests, or it is named."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from functools import cache

import pytest

from tests.mutants.__main__ import from_file, judged
from tests.mutants.listed import LISTED
from tests.mutants.place import REPO, Mutant, Stale
from tests.mutants.processes import Run
from tests.rig.extension import Instead

DIGEST = Mutant("drop", "pdtransport.protocol.digest", "commit_digest", "first_token is not None", "False", ("t",))


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((REPO / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("mutant", LISTED, ids=lambda mutant: mutant.name)
def test_a_bugs_place_exists_and_so_do_the_tests_that_find_it(mutant: Mutant) -> None:
    """Whoever renames a function, or a test, hears of the bugs that name it here; none is passed over in silence."""
    assert mutant.source() != mutant.path.read_text()
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert name in names_in(path), f"{mutant.name}: {path} has no {name}"


@pytest.mark.parametrize("mutant", from_file(REPO / "tests/mutants/unseen.json"), ids=lambda mutant: mutant.name)
def test_bugs_of_somebody_who_has_not_seen_the_tests_have_a_place(mutant: Mutant) -> None:
    """Their tests are all fast ones; their places must exist, too."""
    assert mutant.source() != mutant.path.read_text()


def test_a_bug_has_one_entry() -> None:
    assert len({mutant.name for mutant in LISTED}) == len(LISTED)
    assert len({(mutant.module, mutant.symbol, mutant.old, mutant.new) for mutant in LISTED}) == len(LISTED)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"module": "pdtransport.protocol.gone"}, "pdtransport.protocol.gone does not exist"),
        ({"symbol": "gone"}, "has no gone"),
        ({"symbol": "commit_digest.gone"}, "has no commit_digest.gone"),
        ({"old": "gone"}, "'gone' 0 times, not once"),
        ({"old": "state"}, "times, not once"),
        ({"new": "("}, "is no Python"),
        ({"module": "kernels/csrc/gone.c"}, "does not exist"),
        ({"module": "kernels/csrc/pages.c", "symbol": "gone"}, "has no gone"),
        ({"module": "kernels/csrc/pages.c", "symbol": "pdt_copy", "old": "gone"}, "0 times"),
    ],
)
def test_a_place_that_is_gone_is_said_by_name(change: dict[str, str], says: str) -> None:
    with pytest.raises(Stale, match="mutant drop: ") as stale:
        replace(DIGEST, **change).source()  # type: ignore[arg-type]
    assert says in str(stale.value)


def test_a_bug_changes_its_symbol_and_nothing_else() -> None:
    """The same passage elsewhere in the file, as in another method, stays."""
    mutant = Mutant("m", "pdtransport.protocol.producer", "ProducerMachine.push_failed", "return []", "return 1", ())
    before, after = mutant.path.read_text().splitlines(), mutant.source().splitlines()
    changed = [number for number, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    (line,) = changed
    assert "def push_failed" in "".join(before[line - 4 : line])


def test_a_module_with_a_bug_stands_in_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug is there for who imports the module in this process; the file, and what Python caches of it, are not
    touched."""
    before = DIGEST.path.read_bytes()
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    kept = sys.modules.pop(DIGEST.module, None)
    try:
        instead = Instead(DIGEST.module, DIGEST.path, DIGEST.source())
        instead.install()
        from pdtransport.protocol.digest import commit_digest

        assert instead.used
        assert commit_digest(b"k", [], 7) == commit_digest(b"k", [])
        with pytest.raises(RuntimeError, match="imported already"):
            instead.install()
    finally:
        sys.modules.pop(DIGEST.module, None)
        if kept is not None:
            sys.modules[DIGEST.module] = kept
            sys.modules["pdtransport.protocol"].digest = kept  # type: ignore[attr-defined]
    assert DIGEST.path.read_bytes() == before


@pytest.mark.parametrize(
    ("run", "how"),
    [
        (Run(exit=1, failed=["a"], passed=3), "found by a"),
        (Run(exit=-1), "found: its tests do not end"),
        (Run(exit=0, passed=3), ""),
    ],
)
def test_a_bug_is_found_by_a_test_that_fails(run: Run, how: str) -> None:
    assert judged(DIGEST, run, named=True) == how


@pytest.mark.parametrize(
    "run", [Run(exit=2), Run(exit=5), Run(exit=0, passed=0), Run(exit=0, passed=1, reached=False), Run(exit=70)]
)
def test_a_bug_that_no_test_ran_with_is_neither_found_nor_alive(run: Run) -> None:
    """An import error, tests that were all skipped, or that never import the module, prove nothing: that ends the
    run."""
    with pytest.raises(SystemExit, match="mutant drop"):
        judged(DIGEST, run, named=True)
