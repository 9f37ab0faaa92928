"""A bell between an engine's workers and its scheduler: "a transfer ended, look at me".

While requests wait for pages and nothing is computed, vLLM steps its workers once a millisecond, and whoever waits for
the other's answer spins. The scheduler's half waits for the bell between such empty steps instead. Ringing it wrongly,
or not at all, costs a little time and nothing else: what ended is reported by the workers' next step in any case.

Beside it the workers pass on from which requests' first tokens decode promised to go on. What a step's output says of
that comes after the requests that ended in this step, and most prompts take one step. A promise that is not heard in
time is as good as none.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct

MAX_REQUEST_ID_BYTES = 1 << 16
_CREDENTIALS = struct.Struct("3i")  # Linux' struct ucred: process, user, group
_PROMISES = "-promises"  # behind the bell's name: its own rings would fill the queue


class Bell:
    """The scheduler's end: datagram sockets in Linux' abstract namespace. Their random names are no secret on a host
    (``/proc/net/unix`` lists them), so the kernel says whose process a word comes from, and only this user's count."""

    def __init__(self) -> None:
        self.name = f"\0pdtransport-{secrets.token_hex(16)}"
        self._socket = _datagrams()
        self._socket.bind(self.name)
        self._promises = _datagrams()
        self._promises.bind(self.name + _PROMISES)

    def wait(self, seconds: float) -> bool:
        """Until somebody rings, at most ``seconds``; True if somebody did."""
        poll = select.poll()  # select() takes no descriptor above 1023, of which an engine may have many
        poll.register(self._socket, select.POLLIN)
        rung = poll.poll(seconds * 1000)
        if rung:
            with contextlib.suppress(BlockingIOError):
                while _heard(self._socket, 16) is not None:
                    pass
        return bool(rung)

    def promises(self) -> set[str]:
        """Ids of the requests that workers told since the last call."""
        told = set()
        with contextlib.suppress(BlockingIOError):
            while (name := _heard(self._promises, MAX_REQUEST_ID_BYTES)) is not None:
                if name:
                    told.add(name.decode(errors="replace"))
        return told

    def close(self) -> None:
        self._socket.close()
        self._promises.close()


def _datagrams() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return made


def _heard(listening: socket.socket, nbytes: int) -> bytes | None:
    """The next datagram; empty if it came from another user, None if it was empty itself.

    Raises:
        BlockingIOError: there is none.
    """
    data, ancillary, _, _ = listening.recvmsg(nbytes, socket.CMSG_SPACE(_CREDENTIALS.size))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(content) == _CREDENTIALS.size:
            return (data or None) if _CREDENTIALS.unpack(content)[1] == os.getuid() else b""
    return b""


class Rope:
    """A worker's end. Callable from any thread, never blocks."""

    def __init__(self) -> None:
        self._socket = _datagrams()
        self.name = ""

    def pull(self) -> None:
        if self.name:
            # Full: it is ringing already. Refused: the scheduler is gone, or on another host, and looks by itself.
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", self.name)

    def tell(self, req_id: str) -> None:
        """Decode goes on from this request's first token."""
        if self.name:
            with contextlib.suppress(OSError):
                self._socket.sendto(req_id.encode(), self.name + _PROMISES)

    def close(self) -> None:
        self._socket.close()
