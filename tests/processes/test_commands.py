"""The commands at a terminal that goes wrong: full, closed, without a reader, without the characters, or with an
impatient user. One line at most, never a traceback, and an exit status that says what happened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdtransport import commands

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "examples" / "models" / "tiny-lm"
QUICKSTART = REPO / "examples" / "quickstart.yaml"
END_S = 90.0
UNWRITTEN, READER_LEFT, INTERRUPTED = 74, 141, 130

# As the installed script does it.
SCRIPT = "import sys; from pdtransport import commands; sys.argv[0] = {name!r}; sys.exit(commands.{name}())"
# The same, interrupted as by Ctrl-C at the n-th event that the interpreter's audit tells of (an import, a file, a
# socket, a process); 0: never. Says how many there were.
INTERRUPTED_SCRIPT = """
import os, signal, sys
from pdtransport import commands
sys.argv[0], at, seen = {name!r}, int(sys.argv.pop(1)), 0
def hook(*_):
    global seen
    seen += 1
    if seen == at:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
try:
    sys.exit(commands.{name}())
finally:
    if not at:
        print("events:", seen)
"""


def run(
    name: str, *arguments: object, script: str = SCRIPT, env: dict[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script.format(name=name), *map(str, arguments)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=REPO, text=True, timeout=END_S, env=env, stdin=subprocess.DEVNULL, **how)


def no_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


ANSWERS: list[tuple[str, tuple[object, ...]]] = [
    ("pdlaunch", ("check", QUICKSTART)),
    ("pdpool", ("--help",)),
    ("pdrouter", ("--version",)),
]


@pytest.mark.parametrize(("name", "arguments"), ANSWERS)
def test_an_answer_that_cannot_be_written_is_one_line(name: str, arguments: Sequence[object]) -> None:
    """On a full device one line says why and the status that it failed; without a reader nothing is said. Neither is a
    traceback, nor Python's own complaint at its end."""
    with open("/dev/full", "wb") as full:
        done = run(name, *arguments, stdout=full)
    assert (done.returncode, done.stderr) == (
        UNWRITTEN, f"{name}: its output can't be written: No space left on device\n"
    )  # fmt: skip
    pipe = no_reader()
    done = run(name, *arguments, stdout=pipe)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (READER_LEFT, "")


def test_closed_streams_change_no_status(tmp_path: Path) -> None:
    """Without standard output or error a command does what it did, and no file that it opens takes their place."""
    done = run("pdlaunch", "size", MODEL, stdout=None, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")
    done = run("pdlaunch", "keys", tmp_path / "keys", preexec_fn=lambda: (os.close(1), os.close(2)))
    assert done.returncode == 0
    assert (tmp_path / "keys" / "control.public").read_text().count("\n") <= 1
    for stream in (lambda: os.close(2), lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 2)):
        assert run("pdpool", "--memory-bytes", "1", preexec_fn=stream).returncode == 2


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_a_terminal_without_the_characters_shows_escapes(tmp_path: Path, env: dict[str, str]) -> None:
    """Names that the terminal can't show are escaped, in answers and in errors."""
    text = (
        QUICKSTART.read_text()
        .replace("./models/tiny-lm", str(MODEL))
        .replace("served_name: tiny-lm", "served_name: 模型")
    )
    assert "模型" in text
    (tmp_path / "t.yaml").write_text(text, encoding="utf-8")
    done = run("pdlaunch", "check", tmp_path / "t.yaml", env=env)
    assert "\\u6a21\\u578b" in done.stdout
    assert "Traceback" not in done.stderr
    (tmp_path / "t.yaml").write_text(text.replace("name:", "名:", 1), encoding="utf-8")
    done = run("pdlaunch", "check", tmp_path / "t.yaml", env=env)
    assert done.returncode == 2
    assert "\\u540d" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_installed_scripts_are_those_that_are_tested() -> None:
    """Not the modules behind them, whose imports a Ctrl-C would break off with a traceback."""
    text = (REPO / "pyproject.toml").read_text()
    for name in ("pdlaunch", "pdpool", "pdrouter"):
        assert f'\n{name} = "pdtransport.commands:{name}"\n' in text
        assert callable(getattr(commands, name))


def points(events: int, count: int) -> list[int]:
    return [1 + round(step * (events - 1) / (count - 1)) for step in range(count)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("pdlaunch", ("check", QUICKSTART)), ("pdpool", ("--status", "--dir", "/nonexistent")), ("pdrouter", ("--help",))],
)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.long)])
def test_ctrl_c_at_any_moment_says_nothing(name: str, arguments: Sequence[object], count: int) -> None:
    """From the first import to the last line: the command ends as one that Ctrl-C ended, or as it would have ended, and
    shows no traceback."""
    usual = run(name, 0, *arguments, script=INTERRUPTED_SCRIPT)
    events = int(usual.stdout.split("events: ")[1])
    assert events > 100
    for at in points(events, count):
        done = run(name, at, *arguments, script=INTERRUPTED_SCRIPT)
        assert done.returncode in (-2, INTERRUPTED, usual.returncode), (at, done)
        assert done.stderr in ("", usual.stderr), at


def served(name: str, told: Callable[[str], bool], *arguments: object) -> None:
    """Start a server, wait for its word, and end it with Ctrl-C: it says nothing about that."""
    command = [sys.executable, "-c", SCRIPT.format(name=name), *map(str, arguments)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert told(process.stdout.readline())
        process.send_signal(2)
        _, errors = process.communicate(timeout=END_S)
    assert process.returncode == 0
    assert not [line for line in errors.splitlines() if "WARNING" not in line]  # of servers that are not there


def test_servers_end_without_a_word(directory: Path) -> None:
    """Ctrl-C is how people end pdpool and pdrouter: status 0."""
    served("pdpool", lambda line: "serves 1 MiB" in line, "--dir", directory, "--memory-bytes", "1MiB")
    dead = ("--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2", "--port", "0")
    served("pdrouter", lambda line: "listening on" in line, *dead)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pdpool", ("--memory-bytes", "1")),
        ("pdpool", ("--tier-option", "x.y=z")),
        ("pdpool", ("--name", "!")),
        ("pdpool", ("--http", "127.0.0.1:0", "--http-key-file", "/nonexistent")),
        ("pdpool", ("--status", "--dir", "/nonexistent")),
        ("pdpool", ("--nothing",)),
        ("pdrouter", ("--prefill", "x", "--decode", "y")),
        ("pdrouter", ("--prefill", "http://a:1", "--decode", "http://b:2", "--api-key-file", "/nonexistent")),
        ("pdlaunch", ("pool", "status", "--pool", "!")),
        ("pdlaunch", ("check", "/nonexistent.yaml")),
        ("pdlaunch", ("size", "/nonexistent")),
        ("pdlaunch", ("nothing",)),
    ],
)
def test_an_error_names_its_command_once(name: str, arguments: Sequence[object]) -> None:
    """One line, which begins with the command's name and does not repeat it."""
    done = run(name, *arguments)
    assert done.returncode in (1, 2)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{name}: ")
    said = line.removeprefix(f"{name}: ")
    assert not said.startswith(("pdlaunch", "pdpool", "pdrouter")), line
