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

GUARD_EXTRA_S = 12.0  # after its grace period a guard may need this long to kill and reap
TAIL_BYTES = 256 << 10  # bytes read from the end of a log
POLL_S = 0.05


class Process:
    """One guarded process; its output is appended to ``log``, accessible only to its owner."""

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
            # A session of its own: Ctrl-C at the terminal reaches only pdlaunch, which stops processes in order.
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
        """PID of the guard."""
        return self._popen.pid

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Exit status, 128 + n for signal n; None while it runs."""
        status = self._popen.poll()
        return status if status is None or status >= 0 else 128 - status

    def out_of_memory(self) -> bool | None:
        """True if the kernel killed any process of the machine for lack of memory since this start; None: unknown."""
        now, before = out_of_memory_kills(), self._out_of_memory_before
        return None if now is None or before is None else now > before

    def stop(self) -> None:
        """Ask the process to end; returns at once."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def hurry(self) -> None:
        """After :meth:`stop`: kill what still runs, without waiting for the grace period."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Last resort, for a guard that does not react: kill it and all its descendants."""
        for pid in [*guard.descendants(self.pid), self.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._popen.wait(timeout=GUARD_EXTRA_S)

    def tail(self, lines: int) -> list[str]:
        """The last ``lines`` lines of its log, without those of an earlier process of the same name."""
        return read_tail(self.log, self._log_from)[-lines:]


def out_of_memory_kills() -> int | None:
    """Number of processes killed for lack of memory since the machine started, in any cgroup; None: unknown."""
    try:
        with open("/proc/vmstat", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), None)
    except (OSError, ValueError, IndexError):
        return None


def read_tail(path: Path, first: int = 0) -> list[str]:
    """The lines in the last :data:`TAIL_BYTES` of a log, from byte ``first`` on; empty if there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(first, size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    # Progress bars write carriage returns: keep only the text after the last one.
    return [line.rstrip().rpartition("\r")[2] for line in text.split("\n") if line.strip()]


def end_strays(root: int, timeout_s: float = GUARD_EXTRA_S) -> None:
    """Kill all processes below ``root`` and reap those that became its children."""
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
    """The processes of one run; leaving the ``with`` block ends all of them.

    ``adopt``: this process is a subreaper and has no other children. Processes left below it at the end (of a guard
    that was itself killed) are strays and are ended too.
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
        """Start a process.

        Args:
            again: an earlier process of this name ended; append to its log.

        Raises:
            OSError: the log can't be written, or no process can be started.
        """
        log = self.folder / f"{name}.log"
        if not again:
            log.unlink(missing_ok=True)
        process = Process(name, argv, log=log, env=env or {}, cwd=cwd, grace_s=self._grace_s)
        self.processes.append(process)
        return process

    def dead(self) -> Process | None:
        """A process that ended unexpectedly and that the others need; None if there is none."""
        return next((one for one in self.processes if one not in self._spared and one.poll() is not None), None)

    def spare(self, process: Process) -> None:
        """Mark a process as optional: :meth:`dead` does not report it."""
        self._spared.append(process)

    def forget(self, process: Process) -> None:
        """Remove a process whose end has been handled."""
        self.processes.remove(process)
        self._spared.remove(process)

    def stop(self) -> None:
        """End all processes; returns when they are gone. A second Ctrl-C meanwhile sets :attr:`hurried`."""
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
