"""Runs one command and makes sure that none of its processes outlives pdlaunch.

pdlaunch starts this file as a script, once per server: ``guard.py PARENT_PID GRACE_S COMMAND...``. The guard

- gets a signal from the kernel when pdlaunch dies for any reason, and then stops the command;
- is a subreaper: it adopts orphans of the command's children, so that engine cores and workers in sessions of their own
  are found as well;
- exits only when no descendant is left: it sends SIGTERM first, and SIGKILL after ``GRACE_S`` seconds.

It exits with the command's status, or 128 + n if signal n ended the command. It uses only the standard library, because
it runs isolated from site-packages.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05
KILL_ROUNDS_S = 10.0  # after SIGKILL only processes stuck in the kernel remain; they are reported, not waited for

_stop_at: float | None = None  # monotonic time at which the guard was asked to stop
_hurry = False


def _told_to_stop(number: int, frame: FrameType | None) -> None:
    global _stop_at, _hurry
    _hurry = _stop_at is not None and number == signal.SIGINT
    _stop_at = _stop_at if _stop_at is not None else time.monotonic()


def set_parent_death_signal(number: int) -> None:
    """Make the kernel send ``number`` to this process when its parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def become_subreaper() -> None:
    """Orphaned descendants become children of this process instead of the machine's init process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(root: int) -> list[int]:
    """All live processes below ``root``, without ``root`` itself."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process ended meanwhile
        if fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    below = [root]
    while below:
        below = [child for parent in below for child in children.get(parent, ())]
        found += below
    return found


def _signal_all(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _reap(main: int, status: int | None) -> int | None:
    """Reap ended children; returns the main child's exit status once it is known."""
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == main:
            status = os.waitstatus_to_exitcode(raw)


def _watch(main: int, grace_s: float) -> int:
    """Wait until the command ends or a stop is requested, then end all descendants.

    Returns the command's exit status.
    """
    status: int | None = None
    while status is None and _stop_at is None:
        time.sleep(POLL_S)
        status = _reap(main, status)
    # Let the command shut down its own children first; signal those that are left after it.
    deadline = time.monotonic() + grace_s
    told: set[int] = set()
    while (left := descendants(os.getpid())) and time.monotonic() < deadline and not _hurry:
        fresh = [pid for pid in left if pid not in told and (status is not None or pid == main)]
        _signal_all(fresh, signal.SIGTERM)
        told.update(fresh)
        time.sleep(POLL_S)
        status = _reap(main, status)
    deadline = time.monotonic() + KILL_ROUNDS_S
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        _signal_all(left, signal.SIGKILL)
        time.sleep(POLL_S)
        status = _reap(main, status)
    if left:
        _complain(f"processes {left} did not end on SIGKILL")
    status = _reap(main, status)
    return status if status is not None else -signal.SIGKILL


def _complain(text: str) -> None:
    try:
        print(f"pdlaunch guard: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # the device is full; the exit status matters more


def main(argv: list[str]) -> int:
    parent, grace_s, command = int(argv[0]), float(argv[1]), argv[2:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _told_to_stop)
    set_parent_death_signal(signal.SIGTERM)
    become_subreaper()
    if os.getppid() != parent:
        return 128 + signal.SIGTERM  # pdlaunch died before PR_SET_PDEATHSIG took effect
    me = os.getpid()

    def before_exec() -> None:
        # If the guard itself is killed, the command gets SIGTERM.
        set_parent_death_signal(signal.SIGTERM)
        if os.getppid() != me:
            os._exit(1)

    try:
        child = subprocess.Popen(command, preexec_fn=before_exec, start_new_session=True)
    except OSError as error:
        _complain(f"can't start {command[0]}: {error.strerror}")
        return 127
    status = _watch(child.pid, grace_s)
    child.returncode = status  # already reaped; Popen must not wait for it again
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
