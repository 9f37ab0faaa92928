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
import secrets
import select
import socket

MAX_REQUEST_ID_BYTES = 1 << 16
_PROMISES = "-promises"  # behind the bell's name: its own rings would fill the queue


class Bell:
    """The scheduler's end: datagram sockets in Linux' abstract namespace, under an unguessable name."""

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
                while self._socket.recv(16):
                    pass
        return bool(rung)

    def promises(self) -> set[str]:
        """Ids of the requests that workers told since the last call."""
        told = set()
        with contextlib.suppress(BlockingIOError):
            while name := self._promises.recv(MAX_REQUEST_ID_BYTES):
                told.add(name.decode(errors="replace"))
        return told

    def close(self) -> None:
        self._socket.close()
        self._promises.close()


def _datagrams() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setblocking(False)
    return made


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
