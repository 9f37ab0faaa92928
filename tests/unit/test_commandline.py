"""The commands' first contact: a topology by itself is run, and a mistake is one line that says what there is."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from pdtransport import __version__
from pdtransport.launch import cli as launch
from pdtransport.pool import cli as pool
from pdtransport.router import cli as router

COMMANDS = {"pdlaunch": launch.main, "pdpool": pool.main, "pdrouter": router.main}


@pytest.mark.parametrize(
    ("argv", "means"),
    [
        (["topology.yaml"], ["up", "topology.yaml"]),
        (["topology.yml", "--no-proof"], ["up", "topology.yml", "--no-proof"]),
        (["--json", "topology.yaml"], ["up", "--json", "topology.yaml"]),
        (["--run-dir", "up-to", "topology.yaml"], ["up", "--run-dir", "up-to", "topology.yaml"]),
        (["here"], ["up", "here"]),  # a file that is there, whatever its name
        (["./up"], ["up", "./up"]),
        (["up", "topology.yaml"], ["up", "topology.yaml"]),
        (["check", "topology.yaml"], ["check", "topology.yaml"]),
        (["check"], ["check"]),  # and not the file of that name
        (["pool", "status", "--dir", "x.yaml"], ["pool", "status", "--dir", "x.yaml"]),
        (["--help"], ["--help"]),
        (["--version"], ["--version"]),
    ],
)
def test_a_topology_by_itself_is_brought_up(
    argv: list[str], means: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pdlaunch topology.yaml` is `pdlaunch up topology.yaml`; verbs are verbs, and `./up` is a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("here", "up", "check"):
        Path(name).touch()
    assert launch.spelt_out(argv) == means


def test_a_topology_by_itself_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with it is told as `up` tells it."""
    file = tmp_path / "t.yaml"
    file.write_text("apiVersion: pdtransport/v1\nname: x\n")
    for argv in ([str(file)], ["up", str(file)]):
        assert launch.main(argv) == launch.USAGE
        assert f"{file}:1:1: model: " in capsys.readouterr().err
    assert launch.main([str(tmp_path / "none.yaml")]) == launch.USAGE
    assert capsys.readouterr().err == f"pdlaunch: {tmp_path / 'none.yaml'}: No such file or directory\n"


def said(
    command: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """Exit status and standard error."""
    try:
        status: object = command(argv)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("pdlaunch", ["typo"], ["'typo'", *launch.VERBS, "topology file"]),
        ("pdlaunch", [], [*launch.VERBS, "topology file"]),
        ("pdlaunch", ["up"], ["TOPOLOGY", "pdlaunch up --help"]),
        ("pdlaunch", ["size", "m", "--tp", "q"], ["--tp", "'q'", "pdlaunch size --help"]),
        ("pdlaunch", ["pool"], ["VERB", "pdlaunch pool --help"]),
        ("pdrouter", ["--prefil", "x"], ["--prefill, --decode", "pdrouter --help"]),
        ("pdrouter", ["--prefill", "http://a:1", "--decode", "http://b:1", "--prot", "1"], ["--prot"]),
        ("pdpool", ["--disk"], ["--disk", "pdpool --help"]),
    ],
)
def test_a_wrong_command_line_is_one_line(
    name: str, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, the command's name, what is wrong, and where the options are listed: no page of usage before it."""
    status, text = said(COMMANDS[name], argv, capsys)
    assert status == 2
    assert text.startswith(f"{name}: ")
    assert text.count("\n") == 1, text
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_tells_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        COMMANDS[name](["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"


def test_the_routers_help_is_grouped_and_begins_with_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    """A usage of one line, what every call needs first, and at the end examples that parse."""
    with pytest.raises(SystemExit):
        router.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: pdrouter --prefill URL ... --decode URL ... [option ...]\n\n")
    places = [text.index(f"\n{name}:\n") for name in ("servers and ports", "keys", "limits", "requests", "timeouts")]
    assert places == sorted(places)
    assert text.index("--prefill URL [") < text.index("--max-body-bytes")
    examples = text.partition("\nexamples:\n")[2].replace("\\\n", "").splitlines()
    assert len(examples) == 2
    for example in examples:
        command, *argv = shlex.split(example)
        assert command == "pdrouter"
        router.settings_from(router.parser().parse_args(argv))
