"""What pdtransport logs in a process of vLLM's stands in vLLM's log, in its form, once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

FORM = r"\(\w+ pid=\d+\) {} \d\d-\d\d \d\d:\d\d:\d\d \[\S+:\d+\] {}"
LINES = """
import logging, sys
{before}
from pdtransport.vllm import register
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
log = logging.getLogger("pdtransport.transfer.peers")
register()
{middle}
configure_logging(LoggingConfig())
register()
log.debug("fine print")
log.info("pages come over %s", "cma")
log.warning("peer is gone")
logging.getLogger("pdtransport").info("of the package")
"""


def logged(before: str = "", middle: str = "", **env: str) -> list[str]:
    """What a process of vLLM's that logs these lines writes to both its outputs."""
    program = LINES.format(before=before, middle=middle)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "VLLM_NO_USAGE_STATS": "1", **env},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    )
    wanted = ("fine print", "pages come over cma", "peer is gone", "of the package")
    return [line for line in done.stdout.splitlines() if any(text in line for text in wanted)]


@pytest.mark.parametrize(
    "before",
    [
        "import pdtransport.transfer.peers; logging.basicConfig(level=logging.INFO)",
        pytest.param("", marks=pytest.mark.long),
    ],
    ids=["configured", "bare"],
)
def test_lines_have_vllms_form_and_come_once(before: str) -> None:
    """Also where the root logger has a handler, and where the package was imported and registered before vLLM
    configured its own."""
    info, warning, package = logged(before)
    assert re.fullmatch(FORM.format("INFO", "pages come over cma"), info), info
    assert re.fullmatch(FORM.format("WARNING", "peer is gone"), warning), warning
    assert re.fullmatch(FORM.format("INFO", "of the package"), package), package


@pytest.mark.more  # a process that imports vLLM each
def test_the_level_is_vllms() -> None:
    """``VLLM_LOGGING_LEVEL`` decides for both."""
    assert len(logged(VLLM_LOGGING_LEVEL="DEBUG")) == 4
    (only,) = logged(VLLM_LOGGING_LEVEL="WARNING")
    assert "peer is gone" in only


@pytest.mark.more  # a process that imports vLLM each
def test_a_logger_that_a_user_configured_is_left_alone(tmp_path: Path) -> None:
    """In vLLM's own configuration file, or before vLLM was imported."""
    form = {"format": "mine %(levelname)s %(message)s"}
    handler = {"class": "logging.StreamHandler", "formatter": "mine", "level": "INFO"}
    ours = {"handlers": ["mine"], "level": "INFO", "propagate": False}
    config = {"version": 1, "formatters": {"mine": form}, "handlers": {"mine": handler}}
    file = tmp_path / "logging.json"
    file.write_text(json.dumps({**config, "loggers": {"pdtransport": ours}}))
    expected = ["mine INFO pages come over cma", "mine WARNING peer is gone", "mine INFO of the package"]
    assert logged(VLLM_LOGGING_CONFIG_PATH=str(file)) == expected
    assert [line.split(" ")[-1] for line in logged("logging.getLogger('pdtransport').setLevel('WARNING')")] == ["gone"]


@pytest.mark.more  # a process that imports vLLM each
def test_a_configuration_file_for_vllm_counts_for_us(tmp_path: Path) -> None:
    """Its handlers and level, without a word about pdtransport; also once it is read anew."""
    form = {"format": "theirs %(levelname)s %(message)s"}
    handler = {"class": "logging.StreamHandler", "formatter": "theirs"}
    config = {"version": 1, "formatters": {"theirs": form}, "handlers": {"theirs": handler}}
    file = tmp_path / "logging.json"
    file.write_text(json.dumps({**config, "loggers": {"vllm": {"handlers": ["theirs"], "level": "WARNING"}}}))
    assert logged(VLLM_LOGGING_CONFIG_PATH=str(file)) == ["theirs WARNING peer is gone"]
    anew = "configure_logging(LoggingConfig())"
    assert logged(middle=anew, VLLM_LOGGING_CONFIG_PATH=str(file)) == ["theirs WARNING peer is gone"]


@pytest.mark.more  # a process that imports vLLM each
def test_without_vllms_configuration_lines_go_where_a_users_root_logger_sends_them() -> None:
    """``VLLM_CONFIGURE_LOGGING=0``: whoever embeds vLLM configures logging."""
    root = "logging.basicConfig(level=logging.INFO, format='root %(message)s')"
    expected = ["root pages come over cma", "root peer is gone", "root of the package"]
    assert logged(root, VLLM_CONFIGURE_LOGGING="0") == expected


@pytest.mark.more
def test_importing_changes_no_logger() -> None:
    """Only being registered in a process of vLLM's does."""
    program = (
        "import logging, pdtransport.vllm, pdtransport.vllm.connector; ours = logging.getLogger('pdtransport'); "
        "assert (ours.handlers, ours.level, ours.propagate) == ([], 0, True)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=120, check=True)
