"""The TCP connections that a listening socket has accepted: how many, whose, and who is sent away.

libzmq neither bounds nor closes single connections, so this is done beside it: it reports each connection's descriptor
when it accepts it and when it has closed it, and a connection is cut by shutting its socket down. A descriptor may have
been given to another file meanwhile; who is meant is checked, on a copy that can't be, by both addresses.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pdtransport.control.limits import (
    DESCRIPTORS_SPARE,
    LOOK_AGAIN_S,
    MAX_CONNECTIONS,
    MAX_PEERS,
    MAX_STRANGERS,
    MAX_WATCHERS,
    STRANGER_BYTES,
    STRANGER_BYTES_PER_S,
    UNDER_WAY_BYTES,
)
from pdtransport.control.owners import Owners, held
from pdtransport.system.descriptors import raise_limit

_RECEIVED_AT = 128  # of tcpi_bytes_received in struct tcp_info
_RECEIVED = struct.Struct("=Q")


@dataclass(eq=False)
class Accepted:
    """One connection, a stranger's until it is ``known``. Where it comes from is asked when it first says something."""

    descriptor: int
    since: float  # it has been a stranger, from so many bytes on
    sent_before: int = 0
    known: bool = False
    there: tuple[str, int] | None = None

    def __str__(self) -> str:
        return "a connection" if self.there is None else _shown(*self.there)


class Door:
    """Who came through one listening socket. No socket of its own, and no clock.

    Args:
        port: where it listens.
        owners: only processes of this user may come; None: everybody (keys say who).
        most: connections at once; default as many as the limits and this process's descriptors allow.
    """

    def __init__(self, port: int, owners: Owners | None, most: int | None = None) -> None:
        self._port, self._owners = port, owners
        self._most = room() if most is None else most
        self._callers: dict[int, Accepted] = {}
        self._strangers: dict[int, Accepted] = {}  # those of them who are not known, oldest first
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._callers)

    def of(self, descriptor: int) -> Accepted | None:
        return self._callers.get(descriptor)

    def accepted(self, descriptor: int, now: float, staying: Collection[Accepted] = ()) -> str:
        """libzmq has a new connection. Returns why one was closed for it, or it itself; empty: none was. ``staying``:
        strangers that are not closed to make room."""
        former = self._callers.get(descriptor)
        if former is not None:
            self.closed(former)
        self._callers[descriptor] = self._strangers[descriptor] = Accepted(descriptor, now)
        if len(self._strangers) <= MAX_STRANGERS and len(self._callers) <= self._most:
            return ""
        oldest = next(each for each in self._strangers.values() if each not in staying)  # it itself, if need be
        self.cut(oldest)
        return f"closed {oldest}, the oldest of {len(self._strangers) + 1} that have not said who they are"

    def identify(self, caller: Accepted) -> str:
        """Ask whose connection it is, before anything that it says is looked at. Returns why it is not let in.

        Raises:
            OSError: it is closed.
        """
        with self._held(caller) as connection:
            caller.there = connection.getpeername()[:2]
            return self._owners.complaint(connection) if self._owners is not None else ""

    def closed(self, caller: Accepted) -> None:
        if self._callers.get(caller.descriptor) is caller:
            del self._callers[caller.descriptor]
            self._strangers.pop(caller.descriptor, None)

    def lost(self, caller: Accepted) -> None:
        """A frame could not be sent over it. It may only seem to be that connection: of frames that a connection left
        behind libzmq tells the descriptor, which may be a newer connection's by now, and that one stays."""
        try:
            with self._held(caller):
                return
        except OSError:
            self.closed(caller)

    def know(self, caller: Accepted) -> None:
        """It is a peer's."""
        if self._strangers.get(caller.descriptor) is caller:
            del self._strangers[caller.descriptor]
            caller.known = True

    def forget(self, caller: Accepted, now: float) -> None:
        """It is a stranger again: its account starts anew."""
        if caller.known and self._callers.get(caller.descriptor) is caller:
            caller.known, caller.since = False, now
            caller.sent_before = _received(caller.descriptor) + UNDER_WAY_BYTES
            self._strangers[caller.descriptor] = caller

    def cut(self, caller: Accepted) -> None:
        """Close its connection: libzmq sees its end, and drops what it has of it."""
        if self._callers.get(caller.descriptor) is not caller:
            return
        self.closed(caller)
        with contextlib.suppress(OSError), self._held(caller) as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def look(self, now: float) -> list[Accepted]:
        """Strangers that have sent more than they may, as the kernel counts it: also what libzmq keeps to itself, the
        first parts of a message without an end."""
        if not self._strangers or now < self._look_at:
            return []
        self._look_at = now + LOOK_AGAIN_S
        return [
            each
            for each in self._strangers.values()
            if _received(each.descriptor) - each.sent_before
            > STRANGER_BYTES + STRANGER_BYTES_PER_S * (now - each.since)
        ]

    def next_deadline(self) -> float | None:
        return self._look_at if self._strangers else None

    @contextlib.contextmanager
    def _held(self, caller: Accepted) -> Iterator[socket.socket]:
        """Its socket.

        Raises:
            OSError: it is closed.
        """
        with held(caller.descriptor) as connection:
            here = connection.getsockname()
            if here[1] != self._port or (caller.there is not None and connection.getpeername()[:2] != caller.there):
                raise ConnectionResetError(errno.ECONNRESET, "its descriptor is another file's by now")
            yield connection


def room() -> int:
    """How many connections may be open at once: with our own to others at most half of this process's descriptors. The
    soft limit is raised as far as the hard one allows."""
    most = MAX_PEERS + MAX_WATCHERS + MAX_STRANGERS
    allowed = raise_limit(most + 4 * MAX_CONNECTIONS + DESCRIPTORS_SPARE)
    return max(1, min(most, (allowed - DESCRIPTORS_SPARE) // 2))


def _received(descriptor: int) -> int:
    """Bytes that came over a connection; 0 if it is closed. A look costs one system call; should the descriptor be
    another's by now, it looks at that one."""
    size = _RECEIVED_AT + _RECEIVED.size
    connection = None
    try:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    except OSError:
        return 0
    finally:
        if connection is not None:
            connection.detach()  # libzmq's it stays
    return int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) if len(info) == size else 0


def _shown(host: str, port: int) -> str:
    host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
