"""Wakeups from an engine's workers to its scheduler: "a transfer ended".

While requests wait for pages and nothing is computed, vLLM steps its workers once a millisecond, and each side spins
while it waits for the other. Instead, the scheduler half waits for a wakeup between such empty steps. A false or lost
wakeup only costs a little time, since the workers' next step reports what ended in any case.

Workers also send two kinds of messages. An *arrival* says that a request's pages arrived, and which first token decode
continues from, if any. A *promise* says that decode will continue from a request's first token. Step outputs carry both
one or two steps later, which is too late for a promise, since most prompts take one step. A lost promise counts as no
promise; the step output makes up for a lost arrival.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import struct
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

MAX_REQUEST_ID_BYTES = 1 << 16
MAX_UNREAD = 4096  # unread entries of each kind of message
MAX_HEARD = 1024  # datagrams that one call reads at most: twice what the kernel queues
MAX_PATH = 107  # bytes of a Unix socket's address
LOOK_S = 0.001  # interval at which wait() checks `unless`
_FOLDER = "pdtransport-bell-"
_LEFT_S = 60.0  # minimum age of a folder without a listener before it is removed as left behind
_MAX_LEFT = 1000  # folders checked
_WORDS = "-words"  # suffix of the message socket, which is separate: wakeups can fill a queue of only ten datagrams
_WORD = struct.Struct("<cH")  # kind and rank, before the request's id
_PROMISED, _ARRIVED = b"p", b"a"
_TOKEN = struct.Struct("<q")  # before the id of a request whose pages arrived: its first token, or _NO_TOKEN
_NO_TOKEN = -1


class WakeupReceiver:
    """The scheduler's end: Unix datagram sockets in a folder of mode 0700.

    The folder keeps out other users of the host; sockets in the abstract namespace would be open to everybody.
    """

    def __init__(self) -> None:
        folder = _make_folder()
        self._remove = weakref.finalize(self, _remove, folder, os.getpid())
        self.name = str(folder / "bell")
        self._socket, self._words = (_datagrams(self.name + suffix) for suffix in ("", _WORDS))
        self._promised: set[str] = set()
        self._arrived: dict[tuple[str, int], int | None] = {}

    def wait(self, seconds: float, unless: Callable[[], bool] | None = None) -> bool:
        """Wait for a wakeup, at most ``seconds``; True if one came.

        Args:
            unless: ends the wait when it returns True; checked every millisecond.
        """
        poll = select.poll()  # select() takes no descriptors above 1023, which an engine may have
        poll.register(self._socket, select.POLLIN)
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not (unless is not None and unless()):
            if poll.poll(1000 * (left if unless is None else min(left, LOOK_S))):
                for _ in _heard(self._socket, 16):
                    pass
                return True
        return False

    def promises(self) -> set[str]:
        """Ids of the requests that decode promised, since the last call, to continue from their first token."""
        self._listen()
        promised, self._promised = self._promised, set()
        return promised

    def arrivals(self) -> dict[tuple[str, int], int | None]:
        """Arrivals since the last call: the first token to continue from, by request id and worker rank.

        The token is None if this worker received none.
        """
        self._listen()
        arrived, self._arrived = self._arrived, {}
        return arrived

    def _listen(self) -> None:
        for word in _heard(self._words, _WORD.size + _TOKEN.size + MAX_REQUEST_ID_BYTES):
            if len(word) <= _WORD.size:
                continue
            kind, rank = _WORD.unpack_from(word)
            rest = word[_WORD.size :]
            if kind == _PROMISED and len(self._promised) < MAX_UNREAD:
                self._promised.add(_text(rest))
            elif kind == _ARRIVED and len(rest) > _TOKEN.size and len(self._arrived) < MAX_UNREAD:
                token = _TOKEN.unpack_from(rest)[0]
                self._arrived[_text(rest[_TOKEN.size :]), rank] = None if token == _NO_TOKEN else token

    def close(self) -> None:
        self._socket.close()
        self._words.close()
        self._remove()


def _text(req_id: bytes) -> str:
    return req_id.decode(errors="replace")


def _datagrams(path: str = "") -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setblocking(False)
    if path:
        made.bind(path)
    return made


def _heard(listening: socket.socket, nbytes: int) -> Iterator[bytes]:
    """Yield unread datagrams, at most ``MAX_HEARD``; the rest is left for the next call."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(MAX_HEARD):
            yield listening.recv(nbytes)


def _make_folder() -> Path:
    """Make a new folder for the sockets of one receiver, and remove folders left behind by killed engines."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) + len(f"/{_FOLDER}12345678/bell{_WORDS}") > MAX_PATH:
        base = "/tmp"
    _sweep(Path(base))
    return Path(tempfile.mkdtemp(prefix=_FOLDER, dir=base))


def _sweep(base: Path) -> None:
    for folder in islice(base.glob(f"{_FOLDER}*"), _MAX_LEFT):
        with contextlib.suppress(OSError):
            facts = folder.lstat()
            if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > _LEFT_S and not _listened_to(folder):
                shutil.rmtree(folder)


def _listened_to(folder: Path) -> bool:
    with _datagrams() as asking:
        try:
            asking.connect(str(folder / "bell"))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process forked from the scheduler's
        shutil.rmtree(folder, ignore_errors=True)


class WakeupSender:
    """A worker's end. Thread-safe; never blocks."""

    def __init__(self) -> None:
        self._socket = _datagrams()
        self.name = ""

    def pull(self) -> None:
        if self.name:
            # Queue full: a wakeup is pending already. Refused: the scheduler is gone, or on another host and polls.
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", self.name)

    def promised(self, req_id: str) -> None:
        """Decode promised to continue from this request's first token."""
        self._tell(_PROMISED, 0, req_id.encode())

    def arrived(self, req_id: str, rank: int, first_token: int | None = None) -> None:
        """This request's pages are in this rank's memory and verified; decode continues from ``first_token``."""
        token = _NO_TOKEN if first_token is None else first_token
        self._tell(_ARRIVED, rank, _TOKEN.pack(token) + req_id.encode())

    def _tell(self, kind: bytes, rank: int, what: bytes) -> None:
        if self.name:
            with contextlib.suppress(OSError):
                self._socket.sendto(_WORD.pack(kind, rank) + what, self.name + _WORDS)

    def close(self) -> None:
        self._socket.close()
