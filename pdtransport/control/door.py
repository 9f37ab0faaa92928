"""Limits the TCP connections that a listening socket has accepted: how many, whose, and which are cut off.

libzmq can neither bound nor close single connections, so this is done from outside: libzmq reports a connection's file
descriptor when it accepts it and when it has closed it, and a connection is cut off by shutting down its TCP socket.
The system may have reused the descriptor for another file meanwhile. So every access works on a duplicate of the
descriptor, which can't be reused, and first checks the connection's two addresses.
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
    """One accepted connection: a stranger's until it is ``known`` to be a peer's."""

    descriptor: int
    since: float  # when it became a stranger's
    sent_before: int = 0  # bytes that don't count against the stranger's budget
    known: bool = False
    there: tuple[str, int] | None = None  # remote address; set with the first frame

    def __str__(self) -> str:
        return "a connection" if self.there is None else _shown(*self.there)


class Door:
    """The connections of one listening socket. Has no socket of its own, and no clock.

    Args:
        port: port of the listening socket.
        owners: admits only processes of this user; None: admit any user (CURVE keys decide, or the network is trusted).
        most: maximum number of connections; default: what the limits and this process' descriptors allow.
    """

    def __init__(self, port: int, owners: Owners | None, most: int | None = None) -> None:
        self._port, self._owners = port, owners
        self._most = room() if most is None else most
        self._callers: dict[int, Accepted] = {}
        self._strangers: dict[int, Accepted] = {}  # the callers that are not known, oldest first
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._callers)

    def of(self, descriptor: int) -> Accepted | None:
        return self._callers.get(descriptor)

    def accepted(self, descriptor: int, now: float, staying: Collection[Accepted] = ()) -> str:
        """libzmq has accepted a connection. If there are too many, cut off the oldest stranger.

        Returns why one was cut off, which may be the new one itself; empty if none was. Strangers in ``staying`` are
        never cut off to make room.
        """
        former = self._callers.get(descriptor)
        if former is not None:
            self.closed(former)
        self._callers[descriptor] = self._strangers[descriptor] = Accepted(descriptor, now)
        if len(self._strangers) <= MAX_STRANGERS and len(self._callers) <= self._most:
            return ""
        oldest = next(each for each in self._strangers.values() if each not in staying)  # the new one, if need be
        self.cut(oldest)
        return f"closed {oldest}, the oldest of {len(self._strangers) + 1} that have not identified themselves"

    def identify(self, caller: Accepted) -> str:
        """Check which user owns a connection, before any of its frames is read.

        Returns why it is not admitted; empty if it is.

        Raises:
            OSError: the connection is closed.
        """
        with self._held(caller) as connection:
            caller.there = connection.getpeername()[:2]
            return self._owners.complaint(connection) if self._owners is not None else ""

    def closed(self, caller: Accepted) -> None:
        if self._callers.get(caller.descriptor) is caller:
            del self._callers[caller.descriptor]
            self._strangers.pop(caller.descriptor, None)

    def lost(self, caller: Accepted) -> None:
        """A frame could not be sent to ``caller``: drop it if its connection is closed.

        It may still be open: for frames that a closed connection left behind, libzmq reports its descriptor, which may
        belong to a newer connection by now. That one stays.
        """
        try:
            with self._held(caller):
                return
        except OSError:
            self.closed(caller)

    def know(self, caller: Accepted) -> None:
        """The connection is a peer's from now on."""
        if self._strangers.get(caller.descriptor) is caller:
            del self._strangers[caller.descriptor]
            caller.known = True

    def forget(self, caller: Accepted, now: float) -> None:
        """The connection is a stranger's again, with a new budget of bytes."""
        if caller.known and self._callers.get(caller.descriptor) is caller:
            caller.known, caller.since = False, now
            caller.sent_before = _received(caller.descriptor) + UNDER_WAY_BYTES
            self._strangers[caller.descriptor] = caller

    def cut(self, caller: Accepted) -> None:
        """Shut the connection down: libzmq notices, and drops what it has read of it."""
        if self._callers.get(caller.descriptor) is not caller:
            return
        self.closed(caller)
        with contextlib.suppress(OSError), self._held(caller) as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def look(self, now: float) -> list[Accepted]:
        """Strangers that have exceeded their budget of bytes, checked every ``LOOK_AGAIN_S``.

        Counts the bytes that the kernel received, so it includes parts of an endless message that libzmq still holds
        back.
        """
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
        """The connection's TCP socket, on a duplicate of its descriptor.

        Raises:
            OSError: the connection is closed, or its descriptor is reused.
        """
        with held(caller.descriptor) as connection:
            here = connection.getsockname()
            if here[1] != self._port or (caller.there is not None and connection.getpeername()[:2] != caller.there):
                raise ConnectionResetError(errno.ECONNRESET, "its descriptor is another file's by now")
            yield connection


def room() -> int:
    """The maximum number of accepted connections: at most half of the file descriptors, less a reserve.

    Raises the soft limit of descriptors as far as it is needed and the hard limit allows.
    """
    most = MAX_PEERS + MAX_WATCHERS + MAX_STRANGERS
    allowed = raise_limit(most + 4 * MAX_CONNECTIONS + DESCRIPTORS_SPARE)
    return max(1, min(most, (allowed - DESCRIPTORS_SPARE) // 2))


def _received(descriptor: int) -> int:
    """Bytes that the kernel has received on a TCP connection; 0 if it is closed.

    Costs one system call. Does not check the addresses: if the descriptor was reused, this reads the new connection.
    """
    size = _RECEIVED_AT + _RECEIVED.size
    connection = None
    try:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    except OSError:
        return 0
    finally:
        if connection is not None:
            connection.detach()  # the descriptor stays libzmq's
    return int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) if len(info) == size else 0


def _shown(host: str, port: int) -> str:
    host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
