"""`pdlaunch status` finds a run by its topology's name, wherever it has its folder, and says what is there instead."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from pdtransport.launch import runs
from pdtransport.launch.rundir import LOCK, RunFolder, default_folder


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def start(stack: ExitStack, folder: Path, name: str = "x", *, serving: bool = True) -> RunFolder:
    run = stack.enter_context(RunFolder(folder))
    runs.remember(name, folder)
    stack.callback(runs.forget, name, folder)
    if serving:
        run.record({"name": name, "pid": os.getpid()})
    return run


@pytest.mark.parametrize("where", ["default", "elsewhere"])
def test_a_run_is_found_by_its_name(state: Path, where: str) -> None:
    """While it is up; and with its ``--run-dir`` too."""
    folder = default_folder("x") if where == "default" else state / "d"
    with ExitStack() as stack:
        start(stack, folder)
        assert runs.find("x", None) == folder
        assert runs.find("x", folder) == folder
        with pytest.raises(runs.NotUp, match=r"y is not up$"):
            runs.find("y", None)
    with pytest.raises(runs.NotUp, match=r"x is not up$"):
        runs.find("x", None)


def test_several_runs_of_a_name_are_told_apart_by_their_folder(state: Path) -> None:
    with ExitStack() as stack:
        for folder in (state / "a", state / "b"):
            start(stack, folder)
        with pytest.raises(
            runs.Ambiguous, match=r"2 runs of x are up: choose one with --run-dir: .*/b, .*/a"
        ) as caught:
            runs.find("x", None)
        assert "\n" not in str(caught.value)
        assert runs.find("x", state / "a") == state / "a"
        with ExitStack() as inner:
            start(inner, default_folder("x"))
            with pytest.raises(runs.Ambiguous, match="3 runs"):
                runs.find("x", None)
    with ExitStack() as stack:
        start(stack, state / "b")
        assert runs.find("x", None) == state / "b", "the other one has ended"


def test_what_a_killed_pdlaunch_leaves_is_no_run_and_is_told(state: Path) -> None:
    """Its lock went with it; its record and its link stay. The next `up` clears the link."""
    dead, next_one = state / "dead", state / "next"
    run = RunFolder(dead).__enter__()
    runs.remember("x", dead)
    run.record({"name": "x", "pid": 7})
    run.close()  # as a kill does
    with pytest.raises(runs.NotUp, match=r"x is not up \(its pdlaunch, pid 7, was killed; logs in .*/dead\)"):
        runs.find("x", None)
    with ExitStack() as stack:
        start(stack, next_one)
        assert runs.find("x", None) == next_one
        assert len(list((default_folder("x") / runs.ELSEWHERE).iterdir())) == 1
    with ExitStack() as stack:
        start(stack, dead)
        assert runs.find("x", None) == dead, "and again in the same folder"


def test_a_run_that_starts_or_has_another_name_is_said(state: Path) -> None:
    with ExitStack() as stack:
        start(stack, state / "d", serving=False)
        with pytest.raises(runs.Starting, match=r"x is starting \(logs in .*/d\)"):
            runs.find("x", None)
        start(stack, state / "e", "other")
        with pytest.raises(runs.Ambiguous, match="holds the run of 'other', not of 'x'"):
            runs.find("x", state / "e")


def test_another_users_folder_is_nobodys_run(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's folder may lie where others can write: one that was replaced is not asked for its workers' addresses."""
    with ExitStack() as stack:
        start(stack, state / "d")
        real = Path.lstat

        def lstat(path: Path) -> os.stat_result:
            found = real(path)
            if path == state / "d" / LOCK:
                return os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))
            return found

        monkeypatch.setattr(Path, "lstat", lstat)
        with pytest.raises(runs.NotUp, match=r"x is not up$"):
            runs.find("x", None)


def test_links_are_bounded_and_rubbish_among_them_is_passed_over(state: Path) -> None:
    place = default_folder("x") / runs.ELSEWHERE
    place.mkdir(parents=True)
    (place / "file").write_text("/somewhere")
    (place / "loop").symlink_to(place / "loop")
    (place / "folder").mkdir()
    with ExitStack() as stack:
        for index in range(runs.MAX_LINKS + 5):
            start(stack, state / str(index))
        assert len([link for link in place.iterdir() if link.is_symlink()]) <= runs.MAX_LINKS
        with pytest.raises(runs.Ambiguous):
            runs.find("x", None)


def test_a_default_folder_that_cannot_be_written_is_an_error_of_the_system(state: Path) -> None:
    """`up` with a ``--run-dir`` goes on without: it warns."""
    (state / "state").write_text("no folder")
    with pytest.raises(OSError, match="state"):
        runs.remember("x", state / "d")
    runs.forget("x", state / "d")
    with pytest.raises(runs.NotUp):
        runs.find("x", None)
