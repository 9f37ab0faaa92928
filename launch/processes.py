"""Starts, watches and stops the processes of a topology. Each one runs under a guard (see :mod:`.guard`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdtransport.launch import guard
from pdtransport.system.private_files import open_private

GUARD_EXTRA_S = 12.0  # after its grace period a guard still kills and collects for up to this long
TAIL_BYTES = 256 << 10  # of a log that is read back
POLL_S = 0.05


class Process:
    """One guarded process; its output is appended to ``log``, a file for its owner alone."""

    def __init__(
        self, name: str, argv: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path | None, grace_s: float
    ) -> None:
        self.name = name
        self.log = log
        self.started = time.monotonic()
        self._grace_s = grace_s
        self._out_of_memory_before = out_of_memory_kills()
        command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(grace_s), *argv]
        with open(open_private(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
            self._log_from = os.fstat(output.fileno()).st_size
            # Its own session: a Ctrl-C at the terminal reaches pdlaunch, which stops things in order.
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the guard."""
        return self._popen.pid

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Exit status, 128 + n for signal n; None while it runs."""
        status = self._popen.poll()
        return status if status is None or status >= 0 else 128 - status

    def out_of_memory(self) -> bool | None:
        """Whether the kernel has killed any process of this machine for want of memory since this one started; None
        where it does not tell."""
        now, before = out_of_memory_kills(), self._out_of_memory_before
        return None if now is None or before is None else now > before

    def stop(self) -> None:
        """Ask it to end; returns at once."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def hurry(self) -> None:
        """After :meth:`stop`: kill what still runs, without waiting for the grace period."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """The last resort, for a guard that does not answer: kill it and all below it."""
        for pid in [*guard.descendants(self.pid), self.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._popen.wait(timeout=GUARD_EXTRA_S)

    def tail(self, lines: int) -> list[str]:
        """The last ``lines`` lines of its log, but none of an earlier process of its name."""
        return read_tail(self.log, self._log_from)[-lines:]


def out_of_memory_kills() -> int | None:
    """Processes that the kernel has killed for want of memory since the machine started, in any control group; None
    where it does not tell."""
    try:
        with open("/proc/vmstat", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), None)
    except (OSError, ValueError, IndexError):
        return None


def read_tail(path: Path, first: int = 0) -> list[str]:
    """The lines in the last :data:`TAIL_BYTES` of a log, from byte ``first`` on; empty where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(first, size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    # Progress bars write carriage returns: what counts is the text after the last one.
    return [line.rstrip().rpartition("\r")[2] for line in text.split("\n") if line.strip()]


def end_strays(root: int, timeout_s: float = GUARD_EXTRA_S) -> None:
    """Kill every process below ``root`` and collect those that became its children."""
    deadline = time.monotonic() + timeout_s
    while (left := guard.descendants(root)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                pass
        time.sleep(POLL_S)


class ProcessGroup:
    """The processes of one run; leaving the ``with`` block ends every one of them.

    ``adopt``: this process is a subreaper and has no other children, so whatever is left below it at the end (of a
    guard that was itself killed) is a stray and ends too.
    """

    def __init__(self, folder: Path, *, grace_s: float = 20.0, adopt: bool = False) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self.hurried = False
        self._spared: list[Process] = []
        self._grace_s = grace_s
        self._adopt = adopt

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        again: bool = False,
    ) -> Process:
        """Start a process. ``again``: one of this name ended; its log is gone on with.

        Raises:
            OSError: its log can't be written, or no process can be made.
        """
        log = self.folder / f"{name}.log"
        if not again:
            log.unlink(missing_ok=True)
        process = Process(name, argv, log=log, env=env or {}, cwd=cwd, grace_s=self._grace_s)
        self.processes.append(process)
        return process

    def dead(self) -> Process | None:
        """A process that ended although nobody asked it to, and that the others can't do without."""
        return next((one for one in self.processes if one not in self._spared and one.poll() is not None), None)

    def spare(self, process: Process) -> None:
        """The others can do without this one: :meth:`dead` does not tell of it."""
        self._spared.append(process)

    def forget(self, process: Process) -> None:
        """It has ended, and somebody knows."""
        self.processes.remove(process)
        self._spared.remove(process)

    def stop(self) -> None:
        """End all; returns once they are gone. A second Ctrl-C while it waits sets :attr:`hurried`."""
        for process in reversed(self.processes):
            process.stop()
        deadline = time.monotonic() + self._grace_s + GUARD_EXTRA_S
        told = False
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            if self.hurried and not told:
                told = True
                for process in self.processes:
                    process.hurry()
            time.sleep(POLL_S)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        self.processes.clear()
        self._spared.clear()
        if self._adopt:
            end_strays(os.getpid())

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
