"""pdlaunch and its processes: what it starts it ends, and it says why something failed. Stand-in servers, the real
guard, the real router."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdtransport.launch import cli
from pdtransport.launch.processes import ProcessGroup
from tests.processes.launch_rig import FIRST_PORT, REPO, UP_S, Rig, is_alive, launched, wait_for

pytestmark = pytest.mark.xdist_group("launch")  # the demo's test takes ports of the same range


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with launched(tmp_path) as made:
        yield made


def test_ctrl_c_ends_all_and_exits_0(rig: Rig) -> None:
    """Ctrl-C on a service that is up is the normal way to stop it: status 0, every process gone, ports free."""
    rig.up()
    rig.wait_up()
    everyone = rig.everyone()
    assert len(everyone) >= 6  # a guard and a process for each of two servers and the router
    assert all(map(is_alive, everyone))
    url = f"http://127.0.0.1:{FIRST_PORT + 4}/v1/completions"
    body = json.dumps({"model": "rig", "prompt": "x", "max_tokens": 3}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    assert json.load(urllib.request.urlopen(request, timeout=10))["choices"][0]["text"] == "abc"
    rig.process.send_signal(signal.SIGINT)  # type: ignore[union-attr]
    status, output = rig.end()
    assert status == cli.OK, output
    assert f"http://127.0.0.1:{FIRST_PORT + 4}/v1" in output
    assert f"metrics: http://127.0.0.1:{FIRST_PORT + 4}/metrics; logs: {rig.run_dir}" in output
    assert not [pid for pid in everyone if is_alive(pid)]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", FIRST_PORT))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminate_while_starting_leaves_nothing(rig: Rig, number: int) -> None:
    """A signal during the start ends what has started, and the exit status tells that it never served."""
    rig.data["roles"]["decode"]["args"] = {"silent": True}
    rig.up()
    wait_for(lambda: len(list(rig.pids.iterdir())) == 2)
    everyone = rig.everyone()
    rig.process.send_signal(number)  # type: ignore[union-attr]
    status, output = rig.end()
    assert status == 128 + number, output
    assert not [pid for pid in everyone if is_alive(pid)]


def test_a_pool_comes_first_and_goes_last(rig: Rig) -> None:
    """The topology's pool is up before the servers start, shown by `up`, `status` and `pool status`, and gone at the
    end; one that can't start ends the launch with its own words."""
    place = Path(f"/dev/shm/pdt-test-{os.getpid()}-up")
    rig.data["pool"] = {"dir": str(place), "memory_bytes": "16MiB"}
    rig.up()
    rig.wait_up()
    command = [sys.executable, "-m", "pdtransport.launch.cli"]
    shown = subprocess.run(
        [*command, "pool", "status", "--dir", str(place)], capture_output=True, text=True, timeout=UP_S, check=True
    )
    assert "memory" in shown.stdout
    told = subprocess.run(
        [*command, "status", str(rig.file), "--run-dir", str(rig.run_dir), "--json"],
        capture_output=True, text=True, timeout=UP_S, check=False,
    )  # fmt: skip
    assert json.loads(told.stdout)["pool"]["healthy"]
    assert rig.process is not None
    rig.process.send_signal(signal.SIGINT)
    status, output = rig.end()
    assert status == 0
    assert output.index("starting pool default") < output.index("serves 16 MiB") < output.index("starting prefill-0")
    assert f"pdlaunch pool status --pool default --dir {place}" in output
    assert [path.name for path in place.iterdir()] == ["default.lock"]
    assert not [pid for pid in rig.everyone() if is_alive(pid)]
    place.chmod(0o755)
    rig.up()
    status, output = rig.end()
    assert status == cli.NOT_STARTED
    assert "must be a directory of user" in output
    (place / "default.lock").unlink()
    place.rmdir()


def test_the_router_of_a_launch_tells_the_pool_of_requests(rig: Rig) -> None:
    """Where the pool has a disk: over an API that pdlaunch opened, with a key that nobody else can read."""
    place = Path(f"/dev/shm/pdt-test-{os.getpid()}-hint")
    disk = {"path": str(rig.folder / "disk"), "bytes": "64MiB"}
    rig.data["pool"] = {"dir": str(place), "memory_bytes": "16MiB", "disk": disk}
    rig.up()
    rig.wait_up()
    url = f"http://127.0.0.1:{FIRST_PORT + 4}"
    body = json.dumps({"model": "m", "prompt": list(range(64))}).encode()
    with contextlib.suppress(urllib.error.HTTPError):  # stand-ins complete nothing
        asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(asked, timeout=UP_S)

    def said_no() -> bool:  # it was let in, and knows of no engine
        with urllib.request.urlopen(f"{url}/metrics", timeout=UP_S) as answer:
            return 'pdrouter_pool_hints_total{outcome="refused"} 1' in answer.read().decode()

    wait_for(said_no)
    assert (rig.run_dir / "pool.key").stat().st_mode & 0o077 == 0
    key = (rig.run_dir / "pool.key").read_text()
    assert rig.process is not None
    rig.process.send_signal(signal.SIGINT)
    status, output = rig.end()
    assert status == 0
    assert "HTTP API at http://127.0.0.1:" in output
    assert key
    assert not [path for path in rig.run_dir.rglob("*") if path.is_file() and key in path.read_text(errors="replace")]
    for left in place.iterdir():
        left.unlink()
    place.rmdir()


def test_sigkill_of_pdlaunch_leaves_no_orphan(rig: Rig) -> None:
    """Even a SIGKILLed pdlaunch leaves no process: also none that ignores SIGTERM or has a session of its own."""
    rig.data["roles"]["prefill"]["args"] = {"child": True, "deaf": True}
    rig.data["roles"]["decode"]["args"] = {"child": True}
    rig.up()
    rig.wait_up()
    wait_for(lambda: len(list(rig.pids.iterdir())) == 4)
    everyone = rig.everyone()
    os.kill(rig.process.pid, signal.SIGKILL)  # type: ignore[union-attr]

    def survivors() -> dict[int, bytes]:
        return {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in everyone if is_alive(pid)}

    wait_for(lambda: not [pid for pid in everyone if is_alive(pid)], 30, survivors)


def test_a_killed_guard_leaves_no_orphan(rig: Rig) -> None:
    """If a guard itself is killed, pdlaunch ends everything, the strays of that guard included."""
    rig.data["roles"]["prefill"]["args"] = {"child": True, "deaf": True}
    rig.up()
    rig.wait_up()
    wait_for(lambda: len(list(rig.pids.iterdir())) == 3)
    everyone = rig.everyone()
    guards = [pid for pid in everyone if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(guards) == 3
    os.kill(min(guards), signal.SIGKILL)
    status, output = rig.end()
    assert status == cli.DIED, output
    assert not [pid for pid in everyone if is_alive(pid)]


def test_a_server_that_dies_ends_all_with_its_last_lines(rig: Rig) -> None:
    """A server's death while serving ends the rest, and its last 20 log lines are shown."""
    rig.up()
    rig.wait_up()
    everyone = rig.everyone()
    said = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in everyone}
    [decode] = [pid for pid in everyone if f"--port\0{FIRST_PORT + 1}\0" in said[pid] and "guard.py" not in said[pid]]
    os.kill(decode, signal.SIGUSR1)
    status, output = rig.end()
    assert status == cli.DIED, output
    assert "decode-0 ended with status 4" in output
    assert "| line 29 of the log" in output
    assert "| line 10 of the log" in output
    assert "| line 9 of the log" not in output
    assert not [pid for pid in everyone if is_alive(pid)]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("OSError: [Errno 98] Address already in use", "a port is in use"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "GPU has too little memory"),
        ("OSError: foo/bar is not a local folder and is not a valid model identifier", "the model was not found"),
        ("api_server.py: error: unrecognized arguments: --max-num-seq 8", "does not know the flag --max-num-seq 8"),
        ("(Worker pid=9) ERROR 11-23 21:27:20 [x.py:1] ValueError: a very special reason", "a very special reason"),
    ],
)
def test_a_failed_start_names_the_likely_cause(rig: Rig, line: str, cause: str) -> None:
    """What users meet most is recognised in the log of a server that did not start."""
    rig.data["roles"]["prefill"]["args"] = {"say": line}
    rig.up()
    status, output = rig.end()
    assert status == cli.NOT_STARTED, output
    assert "prefill-0 ended with status 3" in output
    told = [text for text in output.splitlines() if "likely cause" in text]
    assert len(told) == 1
    assert cause in told[0]


def test_a_server_that_is_never_up_ends_the_launch(rig: Rig) -> None:
    """A start has a deadline; it names the setting, and the log lines of the server that is late are shown."""
    rig.data["defaults"]["start_timeout_s"] = 3
    rig.data["roles"]["decode"]["args"] = {"silent": True}
    rig.up()
    status, output = rig.end()
    assert status == cli.NOT_STARTED, output
    assert "decode-0 was not up within 3 s (defaults.start_timeout_s)" in output
    assert "| line 29 of the log" in output


@pytest.mark.long
def test_a_deaf_server_is_killed_after_its_grace(rig: Rig) -> None:
    """A server that ignores SIGTERM does not keep pdlaunch from ending."""
    rig.data["defaults"]["stop_timeout_s"] = 1
    rig.data["roles"]["prefill"]["args"] = {"deaf": True, "child": True}
    rig.up()
    rig.wait_up()
    wait_for(lambda: len(list(rig.pids.iterdir())) == 3)
    everyone = rig.everyone()
    rig.process.send_signal(signal.SIGINT)  # type: ignore[union-attr]
    status, output = rig.end()
    assert status == cli.OK, output
    assert not [pid for pid in everyone if is_alive(pid)]


def test_a_second_ctrl_c_does_not_wait_for_the_grace(rig: Rig) -> None:
    """The second Ctrl-C kills at once what does not end by itself."""
    rig.data["defaults"]["stop_timeout_s"] = 600
    rig.data["roles"]["prefill"]["args"] = {"deaf": True}
    rig.up()
    rig.wait_up()
    everyone = rig.everyone()
    rig.process.send_signal(signal.SIGINT)  # type: ignore[union-attr]
    wait_for(lambda: not is_alive(max(everyone)) or len([pid for pid in everyone if is_alive(pid)]) <= 3)
    rig.process.send_signal(signal.SIGINT)  # type: ignore[union-attr]
    status, output = rig.end()
    assert status == cli.OK, output
    assert not [pid for pid in everyone if is_alive(pid)]


@pytest.mark.parametrize(
    ("offset", "key"), [(0, "roles.prefill.port"), (3, "roles.decode.control_port"), (4, "router.port")]
)
def test_a_port_in_use_is_refused_before_anything_starts(rig: Rig, offset: int, key: str) -> None:
    """A port in use is named with file, line and key, and no process is started."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", FIRST_PORT + offset))
        taken.listen(1)
        rig.up()
        status, output = rig.end()
    assert status == cli.PREFLIGHT, output
    line = [text.split(":")[0] for text in rig.file.read_text().splitlines()]
    assert f"{key}: " in output
    assert f"{FIRST_PORT + offset}" in output
    assert "is in use" in output
    number = int(output.split("topology.yaml:")[1].split(":")[0])
    assert line[number - 1].strip() == key.rpartition(".")[2]
    assert list(rig.pids.iterdir()) == []


@pytest.mark.long  # tests/siege/test_ends.py has the worse case
def test_one_name_is_up_once(rig: Rig) -> None:
    """A second `up` of the same name is refused while the first holds the run's lock, and works after it."""
    rig.up()
    rig.wait_up()
    argv = [sys.executable, "-m", "tests.processes.launch_standins", "up", str(rig.file), "--run-dir", str(rig.run_dir)]
    second = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert second.returncode == cli.PREFLIGHT
    assert f"pid {rig.process.pid}" in second.stderr  # type: ignore[union-attr]
    os.kill(rig.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    rig.end()
    wait_for(lambda: not [pid for pid in rig.everyone() if is_alive(pid)])
    rig.up()
    rig.wait_up()
    rig.process.send_signal(signal.SIGINT)  # type: ignore[union-attr]
    assert rig.end()[0] == cli.OK


@pytest.mark.more
def test_status_finds_a_run_that_has_a_folder_of_its_own(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the topology's name alone, from another terminal; and says so once its pdlaunch was killed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def status() -> tuple[int, str, str]:
        argv = [sys.executable, "-m", "pdtransport.launch.cli", "status", str(rig.file)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=UP_S, check=False)
        return done.returncode, done.stdout, done.stderr

    assert status()[0] == cli.NOT_UP
    process = rig.up()
    rig.wait_up()
    code, text, _ = status()
    # The stand-ins have no workers to ask.
    assert (code, f"rig: serving, but not healthy (pid {process.pid}, logs in {rig.run_dir})" in text) == (1, True)
    process.kill()
    process.wait(UP_S)
    code, _, told = status()
    assert code == cli.NOT_UP
    assert f"its pdlaunch, pid {process.pid}, was killed; logs in {rig.run_dir}" in told


def test_json_keeps_standard_output_to_one_object(rig: Rig) -> None:
    """`up --json` prints one JSON object once it serves; progress goes to standard error."""
    argv = [sys.executable, "-m", "tests.processes.launch_standins", "up", str(rig.file), "--run-dir", str(rig.run_dir)]
    rig.process = subprocess.Popen(
        [*argv, "--json"], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    rig.wait_up()
    told = json.loads(rig.process.stdout.readline())  # type: ignore[union-attr]
    assert told["router"]["url"] == f"http://127.0.0.1:{FIRST_PORT + 4}"
    assert told["proof"] is None
    assert [one["name"] for one in told["instances"]] == ["prefill-0", "decode-0"]
    rig.process.send_signal(signal.SIGINT)
    status, rest = rig.end()
    assert (status, rest) == (cli.OK, "")


def test_a_command_that_is_not_there_is_said(tmp_path: Path) -> None:
    """A guard whose command can't be started ends with 127 and says why in the log."""
    with ProcessGroup(tmp_path) as fleet:
        process = fleet.start("nothing", ["/nonexistent/program"])
        wait_for(lambda: process.poll() is not None)
        assert process.poll() == 127
        assert any("can't start /nonexistent/program" in line for line in process.tail(5))


def test_a_servers_exit_status_comes_through_the_guard(tmp_path: Path) -> None:
    """Exit codes arrive unchanged; death by signal n arrives as 128 + n."""
    with ProcessGroup(tmp_path) as fleet:
        code = fleet.start("code", [sys.executable, "-c", "raise SystemExit(42)"])
        killed = fleet.start("killed", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
        wait_for(lambda: code.poll() is not None and killed.poll() is not None)
        assert (code.poll(), killed.poll()) == (42, 137)
