"""Finds the user that owns the other end of a local TCP connection: SO_PEERCRED for TCP.

Asks the kernel's socket table (sock_diag) by both addresses and ports. Sound because the connection is still open when
it is looked up: no two open connections share both ends, and only an open socket has an owner. A socket that is closed
or not accepted yet has no owner.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator

import zmq

from pdtransport.errors import SettingsError
from pdtransport.settings import ControlSettings

_SOCK_DIAG = 4  # protocol of netlink, see sock_diag(7)
_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST = 1  # NLM_F_REQUEST
_ERROR = 2  # NLMSG_ERROR
_ESTABLISHED = 1
_ANY = 0xFFFFFFFF  # all states; also the cookie of a socket that is looked up by addresses only
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_QUESTION = struct.Struct("=BBBBI")  # family, protocol, extensions, pad, states
_STATE_AT = _HEADER.size + 1
_OWNER_AT = _HEADER.size + 4 + 48 + 12  # after family..retransmits (4), socket id (48), expiry and queues (12)
_OWNER = struct.Struct("=II")  # uid, inode
_ANSWER_BYTES = 4096
_ANSWER_S = 1.0  # a bound only: the kernel answers synchronously
ROOT = 0


class Owners:
    """Looks up owners of connections, in about 50 µs each. Keeps nothing open.

    Raises:
        SettingsError: this kernel does not support it; says what to set instead.
    """

    def __init__(self) -> None:
        self._user = os.geteuid()
        try:
            self._ask(socket.AF_INET, ("127.0.0.1", 0), ("127.0.0.1", 0))
        except (AttributeError, OSError) as error:
            raise SettingsError(
                f"control: this kernel does not report the owners of local connections (sock_diag: {error}): set "
                "control.curve_*_key_file (`pdlaunch keys DIR`), or control.allow_plaintext if every user is trusted"
            ) from None

    def complaint(self, connection: socket.socket) -> str:
        """Why the other end of ``connection`` is not trusted: another user owns it. Empty if this user or root does.

        Raises:
            OSError: the other end has no owner, because it is closed.
        """
        theirs, mine = connection.getpeername(), connection.getsockname()
        owner = self._ask(socket.AF_INET6 if len(mine) == 4 else socket.AF_INET, theirs, mine)
        if owner is None:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if owner in (self._user, ROOT):
            return ""
        return (
            f"it belongs to user {owner}, this process to user {self._user}: without CURVE keys, peers, routers and "
            "status clients must run as one user; set control.curve_*_key_file on all sides (`pdlaunch keys DIR`)"
        )

    def _ask(self, family: int, one: tuple[str, int], other: tuple[str, int]) -> int | None:
        """The uid of the established socket with local address ``one`` and remote address ``other``; None if none.

        Raises:
            OSError: the kernel does not answer.
        """
        ends = struct.pack("!HH", one[1], other[1]) + _packed(family, one[0]) + _packed(family, other[0])
        body = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, _ANY) + ends + struct.pack("=III", 0, _ANY, _ANY)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as kernel:
            kernel.settimeout(_ANSWER_S)
            kernel.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST, 0, 0) + body)
            answer = kernel.recv(_ANSWER_BYTES)
        if _HEADER.unpack_from(answer)[1] == _ERROR:
            (code,) = struct.unpack_from("=i", answer, _HEADER.size)
            if -code == errno.ENOENT:
                return None
            raise OSError(-code, os.strerror(-code))
        uid, inode = _OWNER.unpack_from(answer, _OWNER_AT)
        return int(uid) if answer[_STATE_AT] == _ESTABLISHED and inode else None  # no inode: no process has it


class ListenerOwner:
    """Checks that a listener that we connect to belongs to this user, once per connection.

    Args:
        owners: None: no check (CURVE keys decide, or the network is trusted).
        port: port of the listener.
    """

    def __init__(self, owners: Owners | None, port: int) -> None:
        self._owners, self._port = owners, port
        self._seen: object = None  # our address of the connection that passed the check

    def complaint(self, part: zmq.Frame) -> str:
        """Why the connection over which ``part`` came is not trusted; empty if it is.

        Raises:
            OSError: the connection is closed.
        """
        if self._owners is None:
            return ""
        with held(descriptor_of(part)) as connection:
            mine, theirs = connection.getsockname(), connection.getpeername()
            if theirs[1] != self._port:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            complaint = self._owners.complaint(connection) if mine != self._seen else ""
            self._seen = mine if not complaint else None
            return complaint


def owners_for(settings: ControlSettings, *, keys: bool) -> Owners | None:
    """The check of users, needed if neither CURVE keys nor a trusted network protect the channel; else None.

    Raises:
        SettingsError: as :class:`Owners`.
    """
    return None if keys or settings.allow_plaintext else Owners()


def descriptor_of(part: zmq.Frame) -> int:
    """Descriptor of the TCP socket over which a frame came; -1 if libzmq does not know it."""
    try:
        return int(part.get(zmq.SRCFD))
    except (zmq.ZMQError, TypeError, ValueError):
        return -1


@contextlib.contextmanager
def held(descriptor: int) -> Iterator[socket.socket]:
    """A duplicate of a TCP socket of libzmq, which may close its own descriptor at any time.

    The duplicate keeps referring to the same socket, even if the descriptor is reused.

    Raises:
        OSError: the descriptor is closed, or is not a socket.
    """
    # Opened as IPv6, whose addresses are longer; the actual family shows in the address.
    connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, fileno=os.dup(descriptor))
    try:
        yield connection
    finally:
        connection.close()


def _packed(family: int, address: str) -> bytes:
    return socket.inet_pton(family, address.partition("%")[0]).ljust(16, b"\0")
