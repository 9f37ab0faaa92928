"""Ports for the rig's servers, and who listens on them.

Several test runs may share a machine and a range: a port is taken by locking a file, so that none hands out another's,
and a server counts as up only once one of its own processes listens.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

FIRST_PORT, LAST_PORT = 21400, 21499
PORTS_VARIABLE = "PDTRANSPORT_TEST_PORTS"  # "first-last", where the default range is taken
HOST = "127.0.0.1"
LISTENING = "0A"  # in /proc/net/tcp


class Ports:
    """Hands out ports of one range that nobody listens on and no other run holds; the lock ends with the process."""

    def __init__(self, first: int = FIRST_PORT, last: int = LAST_PORT) -> None:
        text = os.environ.get(PORTS_VARIABLE, f"{first}-{last}")
        first, _, last = text.partition("-")
        self._first, self._last = int(first), int(last or first)
        self._next = self._first
        self._held: dict[int, IO[str]] = {}
        self._locks = Path(tempfile.gettempdir()) / "pdtransport-test-ports"

    def take(self, count: int = 1) -> int:
        """The first of ``count`` free ports in a row, never the ones just given back while others are left.

        Raises:
            RuntimeError: the range holds no such row.
        """
        for _ in range(self._last - self._first + 1):
            if self._next + count - 1 > self._last:
                self._next = self._first
            port, self._next = self._next, self._next + 1
            if self._hold(range(port, port + count)):
                self._next = port + count
                return port
        raise RuntimeError(f"no {count} free ports in {self._first}-{self._last}: set {PORTS_VARIABLE}=first-last")

    def give_back(self, ports: Iterable[int]) -> None:
        for port in ports:
            lock = self._held.pop(port, None)
            if lock is not None:
                lock.close()

    def _hold(self, ports: range) -> bool:
        taken = []
        for port in ports:
            if port in self._held or not self._lock(port):
                break
            taken.append(port)
            if not is_free(port):
                break
        else:
            return True
        self.give_back(taken)
        return False

    def _lock(self, port: int) -> bool:
        self._locks.mkdir(exist_ok=True)
        lock = (self._locks / str(port)).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return False
        self._held[port] = lock
        return True


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def listens(pids: Iterable[int], port: int) -> bool:
    """Whether one of the processes itself listens on a TCP port (IPv4)."""
    wanted = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
            wanted.add(f"socket:[{fields[9]}]")
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # it ended meanwhile
        for name in names:
            try:
                if os.readlink(f"/proc/{pid}/fd/{name}") in wanted:
                    return True
            except OSError:
                continue
    return False
