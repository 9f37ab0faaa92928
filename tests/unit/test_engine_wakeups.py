"""The bell between workers and scheduler, as others on the host find it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from pdtransport.engine import wakeups as module
from pdtransport.engine.results import Results
from pdtransport.engine.stats import TransferStats
from pdtransport.engine.wakeups import MAX_HEARD, MAX_UNREAD, WakeupReceiver, WakeupSender
from pdtransport.transfer.outcome import Outcome

NOBODY = 65534
# Every way in, as another user: the two sockets by their path, the names that they had in the abstract namespace,
# and whatever the kernel lists of ours.
FORGE = f"""
import os, socket, sys
os.setgid({NOBODY}); os.setuid({NOBODY})
made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
names = [sys.argv[1] + suffix for suffix in ("", "-words")]
names += ["\\0" + name.lstrip("/") for name in names]
names += [line.split()[-1].replace("@", "\\0", 1) for line in open("/proc/net/unix") if sys.argv[1] in line]
for name in names:
    for word in (b"!", b"p\\0\\0forged", b"a\\0\\0" + bytes(8) + b"forged"):
        try:
            made.sendto(word, name)
        except OSError as error:
            print(type(error).__name__)
        else:
            print("heard")
try:
    os.listdir(os.path.dirname(sys.argv[1]))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def ends() -> Iterator[tuple[WakeupReceiver, WakeupSender]]:
    bell, rope = WakeupReceiver(), WakeupSender()
    rope.name = bell.name
    yield bell, rope
    bell.close()
    rope.close()


@pytest.mark.parametrize("token", [None, 0, 7])
def test_an_arrival_names_the_token_that_decode_goes_on_from(
    ends: tuple[WakeupReceiver, WakeupSender], token: int | None
) -> None:
    """The bell starts the request at once, before the step's output comes: it must bring the promised first token
    along, or decode would sample another one than the client has."""
    bell, rope = ends
    results = Results(TransferStats, lambda _req_id: None)
    results.rope.close()
    results.rope, results.rank = rope, 3
    results.receipt_ended("r", Outcome("t", ok=True, first_token=token))
    assert bell.arrivals() == {("r", 3): token}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can speak as another user")
def test_the_kernel_lets_no_other_user_of_the_host_say_a_word(ends: tuple[WakeupReceiver, WakeupSender]) -> None:
    """Nobody else can ring, promise a first token, report pages as arrived, or fill the queue: nothing reaches it."""
    bell, rope = ends
    said = subprocess.run(
        [sys.executable, "-c", FORGE, bell.name], check=True, timeout=60, capture_output=True, text=True
    ).stdout.split()
    assert len(said) > 12
    assert set(said) <= {"PermissionError", "ConnectionRefusedError"}
    assert not bell.wait(0.05)
    rope.promised("true")
    assert (bell.promises(), bell.arrivals()) == ({"true"}, {})


def test_the_folder_is_its_users_alone_and_goes_with_the_bell(ends: tuple[WakeupReceiver, WakeupSender]) -> None:
    bell, _ = ends
    folder = Path(bell.name).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    bell.close()
    assert not folder.exists()
    forgotten = WakeupReceiver()
    folder = Path(forgotten.name).parent
    del forgotten
    assert not folder.exists()


def test_a_call_reads_a_bounded_number_of_words(
    ends: tuple[WakeupReceiver, WakeupSender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that come as fast as they are read hold up no call: the rest is for the next one, and nothing is lost."""
    bell, rope = ends
    monkeypatch.setattr(module, "MAX_HEARD", 4)
    for number in range(6):
        rope.arrived(f"r{number}", 0)
        rope.pull()
    assert [len(bell.arrivals()) for _ in range(3)] == [4, 2, 0]
    assert [bell.wait(0.05) for _ in range(3)] == [True, True, False]
    assert MAX_HEARD == 1024


def test_words_that_nobody_asks_for_are_kept_within_a_bound(
    ends: tuple[WakeupReceiver, WakeupSender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that never asks who arrived (``step_ahead`` is off) runs for a year as well."""
    bell, rope = ends
    monkeypatch.setattr(module, "MAX_UNREAD", 3)
    for number in range(10):
        rope.arrived(f"r{number}", 0)
        assert bell.promises() == set()
    assert len(bell.arrivals()) == 3
    assert MAX_UNREAD == 4096


def test_what_killed_engines_left_behind_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL leaves a folder; the next engine of this user removes it, and none in which somebody listens, that was
    made a moment ago, or that is another user's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kill = (
        "import os; from pdtransport.engine.wakeups import WakeupReceiver; bell = WakeupReceiver(); "
        "print(bell.name, flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    left = []
    for _ in range(2):
        made = subprocess.run(
            [sys.executable, "-c", kill], env=environment, capture_output=True, text=True, timeout=120
        )
        left.append(Path(made.stdout.strip()).parent)
    live = WakeupReceiver()
    long_ago = os.stat(left[0]).st_mtime - 3600
    os.utime(left[0], (long_ago, long_ago))
    os.utime(Path(live.name).parent, (long_ago, long_ago))
    next_one = WakeupReceiver()
    try:
        assert [folder.exists() for folder in left] == [False, True]
        assert Path(live.name).exists()
    finally:
        live.close()
        next_one.close()


def test_a_folder_for_temporary_files_with_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has 107 bytes: where the folder's is too long for that, it lies in /tmp."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    bell, rope = WakeupReceiver(), WakeupSender()
    rope.name = bell.name
    try:
        assert bell.name.startswith("/tmp/")
        rope.pull()
        assert bell.wait(5.0)
    finally:
        bell.close()
        rope.close()
        shutil.rmtree(deep)
