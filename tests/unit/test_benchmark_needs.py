"""Benchmarks look at what they need before anything starts, and keep what they measured whatever comes later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _needs, handoff, reuse
from benchmarks._figures import FAILED, INTERRUPTED, keep, measuring
from benchmarks._handoff_systems import Sample
from benchmarks._needs import LACKING, Need, lacking
from tests.rig.servers import ServerFailed

REPO = Path(__file__).resolve().parents[2]


def test_all_that_is_missing_is_told_in_one_line() -> None:
    """Each thing once, with its remedy; what is there is not mentioned."""
    fio = Need("fio", False, "apt-get install fio")
    found = lacking([Need("numpy", True, "?"), fio, Need("a GPU", False, "none here"), fio])
    assert found == "fio (apt-get install fio); a GPU (none here)"
    assert lacking([]) == ""
    assert not _needs.package("no_such_package_of_anybody", "").there
    assert _needs.package("json", "").there
    assert not _needs.program("no-such-program-of-anybody", "").there
    assert not _needs.room(Path("/dev/shm"), 1 << 60).there
    assert not _needs.room(Path("/no/such/folder"), 1).there


@pytest.mark.parametrize(
    ("benchmark", "argv", "missing"),
    [
        ("reuse", [], "redis-server (apt-get install redis-server, or leave redis out of --systems)"),
        ("reuse", ["--systems", "disk", "--disk", "/no/such/folder"], "/no/such/folder (no such folder)"),
        ("handoff", ["--gpu", "--cards", "70,71"], "72 NVIDIA GPUs (there are "),
        ("interference", ["--gpu", "--cards", "70,71"], "72 NVIDIA GPUs (there are "),
        ("gpu_kernels", ["--devices", "70,71"], "72 NVIDIA GPUs (there are "),
        ("pool", ["--parts", "disk", "--disk", "/no/such/folder"], "/no/such/folder (no such folder)"),
        ("pool", ["--parts", "bytes", "--bytes", str(1 << 50)], "GiB free in /dev/shm ("),
        ("identity_start", ["--gib", "1000000"], "GiB free in "),
        ("codecs", ["--model", "/no/such", "--text", "/no/text"], "/no/such/config.json (--model: "),
    ],
)
def test_a_benchmark_that_lacks_something_says_so_first(
    benchmark: str, argv: list[str], missing: str, tmp_path: Path
) -> None:
    """One line, status 2, within seconds, no file written: nothing was started."""
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", *argv, "--json", str(out)],
        cwd=REPO, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == LACKING, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"benchmarks.{benchmark} needs ")
    assert missing in line
    assert not out.exists()


def test_the_benchmark_of_identities_says_so_first() -> None:
    """It writes no file, but tells of each row as it comes."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.identity", "--gigabytes", "1000000"],
        cwd=REPO, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (LACKING, "")
    assert done.stderr.startswith("benchmarks.identity needs ")


def test_figures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A reader never sees half a file, and nothing is left beside it."""
    file = tmp_path / "found.json"
    for text in ("one", "another"):
        keep(file, text)
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]
    keep(None, "nobody asked")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (ServerFailed("it did not come up"), FAILED, "it did not come up\n"),
        (ZeroDivisionError("by zero"), FAILED, "Traceback"),
    ],
)
def test_what_ends_a_measurement_is_told_and_ends_no_report(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with measuring(ServerFailed) as ending:
        raise error
    assert ending.status == status
    assert said in capsys.readouterr().err


def sample_of(system: str, workload: str, again: bool) -> reuse.Sample:
    return reuse.Sample(system, workload, again, 4000, 20.0 if again else 200.0)


@pytest.mark.parametrize("error", [ServerFailed("no memory"), KeyboardInterrupt()])
def test_reuse_keeps_what_it_measured_before_a_system_failed(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file and the table hold the first system when the second does not start or Ctrl-C ends the run; after a
    failure those that follow are measured all the same."""

    @contextmanager
    def running(system: str, _folder: Path) -> Iterator[str]:
        if system == "memory":
            raise error
        yield system

    async def measure(system: str, *_: Any) -> tuple[list[Any], list[Any]]:
        kinds = [(workload, again) for workload in reuse.ANSWERS for again in (False, True)]
        phases = [reuse.Phase(system, *kind, 1.0, 1.0, 1.0) for kind in kinds]
        return [sample_of(system, *kind) for kind in kinds], phases

    monkeypatch.setattr(reuse, "running", running)
    monkeypatch.setattr(reuse, "measure", measure)
    monkeypatch.setattr(reuse, "needs_of", lambda *_: [])
    file = tmp_path / "found.json"
    status = reuse.main(["--systems", "no pool,memory,disk", "--json", str(file)])
    interrupted = isinstance(error, KeyboardInterrupt)
    assert status == (INTERRUPTED if interrupted else FAILED)
    kept = {sample["system"] for sample in json.loads(file.read_text())["samples"]}
    assert kept == ({"no pool"} if interrupted else {"no pool", "disk"})
    out = capsys.readouterr()
    assert all(system in out.out for system in kept)
    assert "interrupted" in out.err if interrupted else "memory: no memory" in out.err


def test_handoff_keeps_what_it_measured_before_a_system_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for the hand-off's systems."""

    @contextmanager
    def fleet(*specs: Any) -> Iterator[Any]:
        if len(specs) > 1:
            raise ServerFailed("no second server")
        yield specs

    async def measure(system: Any, *_: Any) -> list[Sample]:
        return [Sample(system.name, 512, 0.2)]

    monkeypatch.setattr(handoff, "fleet", fleet)
    monkeypatch.setattr(handoff, "measure", measure)
    monkeypatch.setattr(handoff, "needs_of", lambda *_: [])
    file = tmp_path / "found.json"
    argv = ["--against", "none", "--systems", "aggregated,pdtransport", "--rounds", "1", "--runs", "1"]
    assert handoff.main([*argv, "--json", str(file)]) == FAILED
    assert [sample["system"] for sample in json.loads(file.read_text())["samples"]] == ["aggregated"]
    out = capsys.readouterr()
    assert "aggregated" in out.out
    assert "no second server" in out.err


@pytest.mark.long
def test_the_links_benchmark_keeps_its_rounds_when_it_is_interrupted(tmp_path: Path) -> None:
    """For real: two processes, one link, and Ctrl-C after the first of many rounds."""
    file = tmp_path / "found.json"
    argv = ["--links", "cma", "--pages", "1024", "--bytes", str(4 << 20), "--rounds", "100000", "--json", str(file)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.links", *argv], cwd=REPO, env={**os.environ, "PATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        ends = time.monotonic() + 100
        while not file.exists() and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    if "cma" in err and "interrupted" not in err:
        pytest.skip(f"cma can't be used here: {err}")
    assert process.returncode == INTERRUPTED, err
    assert [row["what"] for row in json.loads(file.read_text())["rows"] if row["how"]][:1] == ["cma"]
    assert "cma" in out
