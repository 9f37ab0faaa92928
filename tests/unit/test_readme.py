"""README's lines can be typed as they stand: each is checked by the parser of the program that it calls.

`tests/processes/test_readme_runs.py` runs them.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pdtransport.launch import cli as launch
from pdtransport.launch.demo import what_next
from pdtransport.launch.reading import load
from pdtransport.pool import cli as pool
from pdtransport.router import cli as router
from pdtransport.settings import Settings
from tests.rig.documents import Command, blocks

REPO = Path(__file__).resolve().parents[2]
README = REPO / "README.md"
TEXT = README.read_text(encoding="utf-8")
SHELL = [(block, command) for block in blocks(README, "bash") for command in block.commands]
LANGUAGES = {"bash", "python", ""}  # "": the picture


def of(*names: str) -> list[Any]:
    """The commands of these programs, as parameters; ``vllm`` stands for vLLM's server."""
    chosen = [(b, c) for b, c in SHELL if ("vllm" if c.is_vllm else c.name) in names]
    return [pytest.param(c, id=f"line {b.line}, {c.words[0]} {i}") for i, (b, c) in enumerate(chosen)]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    """A block without a language is a picture; each command of a shell block is one that a test here knows."""
    for block in blocks(README):
        assert block.language in LANGUAGES, f"line {block.line}"
        assert block.language or "─" in block.text, f"line {block.line}: which language is this?"
    known = {id(p.values[0]) for p in of("vllm", "pdrouter", "pdpool", "pdlaunch", "curl")}
    assert [command.text for _, command in SHELL if id(command) not in known] == []


@cache
def vllm_parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize("command", of("vllm"))
def test_vllms_own_parser_takes_its_arguments(command: Command) -> None:
    """Flags that vLLM has, a role that it knows, and settings that we have."""
    pytest.importorskip("vllm")
    assert all(word.strip() for word in command.words)
    found = vllm_parser().parse_args(command.arguments)
    config = found.kv_transfer_config
    assert config.kv_connector == "PDTransportConnector"
    assert config.kv_role in ("kv_producer", "kv_consumer", "kv_both")
    settings = Settings.parse(config.kv_connector_extra_config)
    if settings.pool is not None or config.kv_role == "kv_consumer":
        assert config.kv_load_failure_policy == "recompute"
    if not command.variables and not command.option("--gpu-memory-utilization"):
        assert found.kv_cache_memory_bytes, "on a CPU host a server takes nearly all memory without this"
        assert (REPO / found.model).is_dir()


@pytest.mark.parametrize("command", of("pdrouter", "pdpool", "pdlaunch"))
def test_our_own_parsers_take_their_arguments(command: Command) -> None:
    """Settings are checked as the programs do; topologies that are named are valid."""
    if command.name == "pdrouter":
        router.settings_from(router.parser().parse_args(command.arguments))
    elif command.name == "pdpool":
        pool.settings_from(pool.parser().parse_args(command.arguments))
    else:
        arguments = launch.parser().parse_args(launch.spelt_out(command.arguments))
        if arguments.verb in ("up", "check", "status"):
            load(REPO / arguments.topology)


@pytest.mark.parametrize("command", of("curl"))
def test_requests_go_to_what_is_started_beside_them(command: Command) -> None:
    """The URL is of a server of the same block, the body is JSON, and its model is the one that is served."""
    [block] = [block for block, other in SHELL if other is command]
    beside = [other for other in block.commands if other.runs_on]
    url = next(word for word in command.words if word.startswith("http://"))
    assert re.match(r"http://127\.0\.0\.1:(\d+)/", url)[1] in [other.option("--port") for other in beside]  # type: ignore[index]
    typed = subprocess.run(
        ["bash", "-c", f"printf %s {shlex_tail(command)}"], capture_output=True, text=True, timeout=10, check=True
    )
    body = json.loads(typed.stdout)
    assert body["model"] in [other.option("--model") for other in beside]


def shlex_tail(command: Command) -> str:
    """The body as it is typed: the shell has yet to fill in what is computed."""
    return command.text.partition(" -d ")[2]


def test_a_second_server_of_a_role_is_given_a_port_by_a_setting_that_there_is() -> None:
    """The piece of JSON in README is one that the settings take."""
    [piece] = re.findall(r'`"kv_connector_extra_config": (\{.*?\})`', TEXT)
    assert Settings.parse(json.loads(piece)).control.base_port("kv_producer") not in (7570, 7670, 7770)


def test_the_demo_ends_with_a_line_that_can_be_typed() -> None:
    """What it names is there: the command beside this Python, the topology, the documents."""
    first, second = what_next(Path("examples/quickstart.yaml")).strip().splitlines()
    command, *argv = shlex.split(first.partition(": ")[2])
    assert Path(command).name == "pdlaunch"
    assert Path(command).parent == Path(sys.executable).parent
    assert launch.parser().parse_args(launch.spelt_out(argv)).verb == "up"
    assert all((REPO / name).exists() for name in second.partition(": ")[2].split(", "))


def test_python_blocks_run_as_they_stand() -> None:
    """Every name in them is defined, and what they assert holds."""
    found = blocks(README, "python")
    assert found
    for block in found:
        done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"line {block.line}: {done.stderr}"


def test_what_is_named_in_the_text_is_there() -> None:
    """Files that are linked, targets of make, extras that pip is told of."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert [link for link in links if link and not (REPO / link).exists()] == []
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", TEXT)) <= set(targets)
    project = (REPO / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^([a-z0-9-]+) = \[", project, re.MULTILINE)
    named = {extra for group in re.findall(r'"\.\[([a-z0-9,-]+)\]"', TEXT) for extra in group.split(",")}
    assert named
    assert named <= set(extras)
    for line in re.findall(r"`(pip install [^`]+)`", TEXT):
        assert not re.search(r"\[[^\]]*vllm", line), f"{line}: no extra brings vLLM"
        shlex.split(line)
