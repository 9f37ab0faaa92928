"""Identity of a process on this host (kernel, PID namespace, start time), for links that work within one host."""

from __future__ import annotations

import ctypes
import os

from pdtransport.errors import LinkUnavailable

PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def host_id() -> str:
    """Identifies the running kernel and the PID namespace of this process.

    Two processes have equal host ids exactly if a PID means the same process to both.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    namespace = os.stat("/proc/self/ns/pid")
    return f"{boot}/{namespace.st_dev}:{namespace.st_ino}"


def start_ticks(stat: bytes) -> int:
    """Start time of a process in clock ticks after boot, from its ``/proc/<pid>/stat``.

    The file holds the process name in parentheses; the name may contain any character, hence the search from the end.
    """
    fields = stat[stat.rindex(b")") + 2 :].split()
    return int(fields[19])


class ProcessWatch:
    """Checks whether process ``pid`` is still the one that started at ``started``; a recycled PID is another process.

    Raises:
        ProcessLookupError: there is no such process, or a later process has its PID.
    """

    def __init__(self, pid: int, started: int) -> None:
        self.pid = pid
        self._started = started
        # An open /proc file stays bound to this very process, so that each later check is one short read.
        self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.check()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        try:
            stat = os.pread(self._stat, 1024, 0)
        except OSError:
            stat = b""
        if not stat or start_ticks(stat) != self._started:
            raise ProcessLookupError(f"process {self.pid} is gone")

    def close(self) -> None:
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1


def neighbour(host: str, pid: int, started: int) -> ProcessWatch:
    """Watch a peer that must be a process of this host.

    Args:
        host: the peer's :func:`host_id`.

    Raises:
        LinkUnavailable: the peer is on another host, in another container, or gone.
    """
    here = host_id()
    if host != here:
        if host.split("/")[0] == here.split("/")[0]:
            raise LinkUnavailable("another container: let both share a PID namespace (docker run --pid, hostPID)")
        raise LinkUnavailable("another host")
    try:
        return ProcessWatch(pid, started)
    except OSError:
        raise LinkUnavailable(f"process {pid} is gone") from None


def my_start_ticks() -> int:
    with open("/proc/self/stat", "rb") as file:
        return start_ticks(file.read())


def allow_reads() -> None:
    """Let other processes of this user read this process's memory under Yama's ptrace_scope 1 (Ubuntu's default).

    Kernels without Yama refuse the call and don't need it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(ctypes.c_int(PR_SET_PTRACER), PR_SET_PTRACER_ANY, *(ctypes.c_ulong(0),) * 3)
