"""Why a process ended: what is known is named, and nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pdtransport.launch import logs
from pdtransport.launch.processes import ProcessGroup, out_of_memory_kills
from tests.processes.launch_rig import wait_for


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (3, "ended with status 3"),
        (128, "ended with status 128"),
        (137, "was ended by SIGKILL"),
        (139, "was ended by SIGSEGV"),
        (255, "ended with status 255"),
    ],
)
def test_how_a_process_ended_is_said_in_words(status: int, words: str) -> None:
    """A signal by its name, any other status by its number."""
    assert logs.ending(status) == words


def test_only_the_kernel_says_that_memory_ran_out() -> None:
    """SIGKILL alone tells nothing: whether the kernel has killed anything for want of memory meanwhile does."""
    lines = ["torch.OutOfMemoryError: CUDA out of memory", "all is well"]
    nobody, yes, unknown = (logs.likely_cause(lines, 137, told) for told in (False, True, None))
    assert nobody == "it was killed by another process: the kernel killed no process for lack of memory meanwhile"
    assert yes is not None
    assert yes.startswith("the kernel killed a process for lack of memory meanwhile, most likely this one")
    assert unknown is not None
    assert unknown.startswith("it was killed by another process, or by the kernel for lack of memory")


def test_a_killed_core_is_told_by_the_kernels_count() -> None:
    """A server whose engine core the kernel killed ends with a status of its own, and its log does not say why."""
    lines = ["EngineDeadError: EngineCore encountered an issue"]
    assert logs.likely_cause(lines, 1, False) == "EngineDeadError: EngineCore encountered an issue"
    assert "for lack of memory" in str(logs.likely_cause(lines, 1, True))
    assert "port is in use" in str(logs.likely_cause(["Address already in use"], 1, True))


def test_the_kernels_count_is_read_for_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the process's start on; a kernel that does not count is no claim."""
    assert out_of_memory_kills() is None or out_of_memory_kills() >= 0  # type: ignore[operator]
    told = [7]
    monkeypatch.setattr("pdtransport.launch.processes.out_of_memory_kills", lambda: told[0])
    with ProcessGroup(tmp_path) as fleet:
        process = fleet.start("x", [sys.executable, "-c", "pass"])
        assert process.out_of_memory() is False
        told[0] = 8
        assert process.out_of_memory() is True
        told[0] = None  # type: ignore[call-overload]
        assert process.out_of_memory() is None
        assert os.stat(process.log).st_mode & 0o077 == 0


def test_a_log_that_is_gone_on_with_tells_of_the_last_process(tmp_path: Path) -> None:
    """What an earlier process of the name wrote stays in the file, and is not taken for the new one's."""
    with ProcessGroup(tmp_path) as fleet:
        first = fleet.start("x", [sys.executable, "-c", "print('one')"])
        wait_for(lambda: first.poll() is not None)
        assert first.tail(9) == ["one"]
        fleet.spare(first)
        assert fleet.dead() is None
        fleet.forget(first)
        second = fleet.start("x", [sys.executable, "-c", "print('two')"], again=True)
        wait_for(lambda: second.poll() is not None)
        assert second.tail(9) == ["two"]
        assert fleet.dead() is second
        assert second.log.read_text() == "one\ntwo\n"
