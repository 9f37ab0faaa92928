"""What ends beside a launch and what it leaves: its pool's death, a second launch of the same pool, files, sockets."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdtransport.launch import cli
from pdtransport.launch.plan import PoolPlan
from pdtransport.launch.pool_keeper import MAX_DEATHS, PoolKeeper
from pdtransport.launch.processes import ProcessGroup
from pdtransport.launch.rundir import read_record
from pdtransport.pool.client.pool_client import PoolClient
from tests.processes.launch_rig import REPO, UP_S, Rig, launched, wait_for
from tests.processes.pool_rig import load, names, store

pytestmark = pytest.mark.xdist_group("launch")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with launched(tmp_path) as made:
        yield made


def stop(rig: Rig) -> str:
    """End the run with Ctrl-C, as people do; what it said."""
    assert rig.process is not None
    rig.process.send_signal(signal.SIGINT)
    status, output = rig.end()
    assert status == cli.OK, output
    return output


def test_a_killed_pool_is_started_again_and_requests_go_on(rig: Rig, directory: Path) -> None:
    """SIGKILL of the pool costs its content and no request: each of 30 around it is answered, its memory is given
    back, it is up again by itself, and a client that used the old one finds the new one. The cause that is named is
    what is known."""
    rig.data["pool"] = {"dir": str(directory), "memory_bytes": "16MiB"}
    rig.up()
    rig.wait_up()
    with PoolClient(directory=directory) as client:
        assert names(store(client, [1])) == ["WRITE"]
        [memory] = directory.glob("*.memory")
        first = rig.pool_pid()
        answers = [rig.complete() for _ in range(10)]
        os.kill(first, signal.SIGKILL)
        answers += [rig.complete() for _ in range(20)]
        assert answers == [(200, "abc")] * 30
        wait_for(lambda: not memory.exists(), instead=lambda: list(directory.iterdir()))
        wait_for(lambda: rig.pool_pid() not in (0, first))
        wait_for(lambda: names(store(client, [2])) == ["WRITE"])
        assert names(load(client, [1, 2])) == ["MISS", "READ"]
        assert len(list(directory.glob("*.memory"))) == 1
    output = stop(rig)
    [said] = [line for line in output.splitlines() if "was ended by SIGKILL" in line]
    assert said.startswith("pool was ended by SIGKILL (it was killed by another process")
    assert "requests are served without it" in said
    assert (rig.run_dir / "pool.log").read_text().count(" serves 16 MiB at ") == 2
    assert [path.name for path in directory.iterdir()] == ["default.lock"]


def test_a_pool_that_never_lasts_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool is started again so many times in a row, after longer and longer pauses; then servers go on without."""
    monkeypatch.setattr("pdtransport.launch.pool_keeper.FIRST_PAUSE_S", 0.01)
    argv = (sys.executable, "-c", "print('pdpool: x serves 1 MiB', flush=True); raise SystemExit(3)")
    said: list[str] = []
    with ProcessGroup(tmp_path) as fleet:
        keeper = PoolKeeper(PoolPlan("x", tmp_path, tmp_path, "", argv), fleet, said.append)
        keeper.serves(wait_for(keeper.ready))

        def given_up() -> bool:
            keeper.look()
            assert fleet.dead() is None
            return "not restarted" in said[-1]

        wait_for(given_up)
        keeper.look()
        assert fleet.processes == []
    pauses = [line for line in said if "restarted in" in line]
    assert len(pauses) == MAX_DEATHS - 1
    assert all("ended with status 3" in line for line in pauses)
    assert pauses[0].partition("restarted in ")[2].startswith("0.01 s")
    assert pauses[-1].partition("restarted in ")[2].startswith("0.16 s")
    assert (tmp_path / "pool.log").read_text().count("serves") == MAX_DEATHS  # the log tells of all of them


@pytest.mark.more
def test_files_of_a_run_are_private_and_sockets_go_with_it(rig: Rig, tmp_path: Path) -> None:
    """Logs, record, lock and folders are for their owner alone whatever the umask says: they name prompts, paths and
    ports. Sockets that vLLM's processes leave are gone after the run; those of a run whose pdlaunch was killed are gone
    after the next."""
    rig.run_dir = tmp_path / "state" / "deep" / "run"
    place = tmp_path / "t"
    place.mkdir()
    rig.environment["TMPDIR"] = str(place)
    rig.data["roles"]["prefill"]["args"] = {"socket": True}

    def sockets() -> list[Path]:
        return [path for path in place.rglob("*") if path.is_socket()]

    before = os.umask(0)
    try:
        process = rig.up()
    finally:
        os.umask(before)
    rig.wait_up()
    paths = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert {path.name for path in paths} >= {"state", "deep", "run", "router.log", "prefill-0.log", "run.json", "lock"}
    modes = {path: path.stat().st_mode for path in paths}
    assert not {path: stat.filemode(mode) for path, mode in modes.items() if mode & 0o077}
    [left] = sockets()
    assert left.parent != place
    assert stat.S_IMODE(left.parent.stat().st_mode) == 0o700
    process.kill()
    rig.end()
    wait_for(lambda: not any(map(alive, rig.everyone())))
    rig.up()
    rig.wait_up()
    assert len(sockets()) == 1
    assert sockets() != [left]
    stop(rig)
    assert list(place.iterdir()) == []


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_full_device_is_one_line(rig: Rig, tmp_path: Path) -> None:
    """A run's folder that has no room ends the launch with a line that names file and remedy."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        (small / "full").write_bytes(bytes(4096))
        rig.run_dir = small / "run"
        rig.up()
        status, output = rig.end()
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert status == cli.PREFLIGHT, output
    assert "Traceback" not in output
    [said] = [line for line in output.splitlines() if "No space left on device" in line]
    assert said.endswith("set --run-dir to a folder that has room")


def test_a_key_that_cannot_be_kept_is_one_line(rig: Rig, tmp_path: Path, directory: Path) -> None:
    """Whatever `up` finds out on its way ends it in a line, with file and remedy, before a server starts."""
    (tmp_path / "state").touch()  # a file where a folder must be
    rig.environment["XDG_STATE_HOME"] = str(tmp_path / "state")
    rig.data["pool"] = {"dir": str(directory), "redis": {"url": "redis://127.0.0.1:1", "bytes": "1MiB"}}
    rig.up()
    status, output = rig.end()
    assert status == cli.NOT_STARTED, output
    assert "Traceback" not in output
    [said] = [line for line in output.splitlines() if line.startswith("pdlaunch: ")]
    assert said.startswith("pdlaunch: pool.digest_key_file: no key can be created at ")
    assert list(rig.pids.iterdir()) == []


def test_progress_that_nobody_reads_ends_nothing(rig: Rig) -> None:
    """A launch whose standard output is closed or full goes on serving: what it says can be done without."""
    with open("/dev/full", "wb") as full:
        argv = [sys.executable, "-m", "tests.processes.launch_standins", "up", str(rig.file), "--run-dir"]
        rig.process = subprocess.Popen(
            [*argv, str(rig.run_dir)], cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True
        )
        rig.wait_up()
        assert rig.complete() == (200, "abc")
        rig.process.send_signal(signal.SIGTERM)
        _, errors = rig.process.communicate(timeout=UP_S)
    assert rig.process.returncode == cli.OK
    assert errors.splitlines() == [
        "standard output can't be written, so no more is written to it: No space left on device"
    ]


# `up` with stand-ins, interrupted as by Ctrl-C at the n-th event of the interpreter's audit; 0: once it serves.
INTERRUPTED = """
import os, signal, sys
from pdtransport.launch import cli
from tests.processes.launch_standins import standin
at, path, seen = int(sys.argv[1]), sys.argv[2:], 0
def hook(*_):
    global seen
    seen += 1
    if seen == at:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
status = cli.main(["up", *path], command=standin)
print("events:", seen)
sys.exit(status)
"""


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [12])
def test_ctrl_c_at_any_moment_of_a_launch_leaves_nothing(rig: Rig, count: int) -> None:
    """From reading the file to the last process's end: no traceback, no process, and a folder that is as it was."""

    def up(at: int) -> tuple[int, str]:
        argv = [sys.executable, "-c", INTERRUPTED, str(at), str(rig.file), "--run-dir", str(rig.run_dir)]
        rig.process = subprocess.Popen(
            argv,
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **rig.environment},
        )
        wait_for(lambda: read_record(rig.run_dir) is not None or rig.process.poll() is not None)  # type: ignore[union-attr]
        if rig.process.poll() is None:
            rig.process.send_signal(signal.SIGINT)
        return rig.end()

    status, said = up(0)
    assert status == cli.OK, said
    events = int(said.split("events: ")[1])
    for step in range(count):
        at = 1 + events * step // count
        status, said = up(at)
        assert status in (cli.OK, 130), said
        assert "Traceback" not in said, (at, said)
        assert not any(map(alive, rig.everyone())), at
        if not rig.run_dir.exists():
            continue
        assert {path.name for path in rig.run_dir.iterdir() if path.suffix != ".log"} <= {"lock"}, at
