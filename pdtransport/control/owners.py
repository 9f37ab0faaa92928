"""Whose a TCP connection of this host is: what SO_PEERCRED says of a Unix socket, from the kernel's table of sockets.

Sound because the connection still stands when it is looked up: both ends are named by addresses and ports, which no two
connections share, and only an open socket has an owner. What is closed, or not accepted yet, counts as nobody's.
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
_ANY = 0xFFFFFFFF  # states, and the cookie of a socket that is known by its addresses only
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_QUESTION = struct.Struct("=BBBBI")  # family, protocol, extensions, pad, states
_STATE_AT = _HEADER.size + 1
_OWNER_AT = _HEADER.size + 4 + 48 + 12  # behind family to retransmits, the socket's id, expiry and queues
_OWNER = struct.Struct("=II")  # uid, inode
_ANSWER_BYTES = 4096
_ANSWER_S = 1.0  # it answers while it is asked
ROOT = 0


class Owners:
    """Asks the kernel, in some 50 µs. Keeps nothing open.

    Raises:
        SettingsError: this kernel does not tell; says what to set instead.
    """

    def __init__(self) -> None:
        self._user = os.geteuid()
        try:
            self._ask(socket.AF_INET, ("127.0.0.1", 0), ("127.0.0.1", 0))
        except (AttributeError, OSError) as error:
            raise SettingsError(
                f"control: this kernel does not tell whose a local connection is (sock_diag: {error}): set "
                "control.curve_*_key_file (`pdlaunch keys DIR`), or control.allow_plaintext where every user is trusted"
            ) from None

    def complaint(self, connection: socket.socket) -> str:
        """Why the other end of ``connection`` is not let in: another user has it. Empty if this one does, or root.

        Raises:
            OSError: nobody has it; it is closed.
        """
        theirs, mine = connection.getpeername(), connection.getsockname()
        owner = self._ask(socket.AF_INET6 if len(mine) == 4 else socket.AF_INET, theirs, mine)
        if owner is None:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if owner in (self._user, ROOT):
            return ""
        return (
            f"it is of user {owner}, this process of user {self._user}: without CURVE keys peers, routers and who asks "
            "for the status must be of one user; set control.curve_*_key_file on all sides (`pdlaunch keys DIR`)"
        )

    def _ask(self, family: int, one: tuple[str, int], other: tuple[str, int]) -> int | None:
        """User of the established socket with these addresses; None if there is none.

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
    """Whether who listens where we connect to is of this user. Asked once a connection.

    Args:
        owners: None: nobody asks (keys say who).
        port: where it listens.
    """

    def __init__(self, owners: Owners | None, port: int) -> None:
        self._owners, self._port = owners, port
        self._seen: object = None  # our end of the connection that was asked about

    def complaint(self, part: zmq.Frame) -> str:
        """Why nothing of the connection that ``part`` came over is believed; empty if it is.

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
    """Where neither keys nor a trusted network say who may come, the user does.

    Raises:
        SettingsError: as :class:`Owners`.
    """
    return None if keys or settings.allow_plaintext else Owners()


def descriptor_of(part: zmq.Frame) -> int:
    """Of the TCP socket that a frame came over; -1 where libzmq does not say."""
    try:
        return int(part.get(zmq.SRCFD))
    except (zmq.ZMQError, TypeError, ValueError):
        return -1


@contextlib.contextmanager
def held(descriptor: int) -> Iterator[socket.socket]:
    """The TCP socket behind a descriptor that libzmq may close at any time: while it is held, it stays the same one.

    Raises:
        OSError: there is none, or it is no socket.
    """
    # As if it were one of IPv6, whose addresses are longer: what the family is in fact, its address says.
    connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, fileno=os.dup(descriptor))
    try:
        yield connection
    finally:
        connection.close()


def _packed(family: int, address: str) -> bytes:
    return socket.inet_pton(family, address.partition("%")[0]).ljust(16, b"\0")
