"""A bell between an engine's workers and its scheduler: "a transfer ended, look at me".

While requests wait for pages and nothing is computed, vLLM steps its workers once a millisecond, and whoever waits for
the other's answer spins. The scheduler's half waits for the bell between such empty steps instead. Ringing it wrongly,
or not at all, costs a little time and nothing else: what ended is reported by the workers' next step in any case.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket


class Bell:
    """The scheduler's end: a datagram socket in Linux' abstract namespace, under an unguessable name."""

    def __init__(self) -> None:
        self.name = f"\0pdtransport-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.name)

    def wait(self, seconds: float) -> bool:
        """Until somebody rings, at most ``seconds``; True if somebody did."""
        rung, _, _ = select.select([self._socket], [], [], seconds)
        if rung:
            with contextlib.suppress(BlockingIOError):
                while self._socket.recv(16):
                    pass
        return bool(rung)

    def close(self) -> None:
        self._socket.close()


class Rope:
    """A worker's end. Callable from any thread, never blocks."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.name = ""

    def pull(self) -> None:
        if self.name:
            # Full: it is ringing already. Refused: the scheduler is gone, or on another host, and looks by itself.
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", self.name)

    def close(self) -> None:
        self._socket.close()
