"""Non-blocking host name lookup: resolves in a thread of its own, since the resolver may take half a minute."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_QUEUED = 64  # names that wait for their turn; further ones are refused
MAX_KNOWN = 1024  # cached answers
FRESH_S = 10.0  # lifetime of a cached answer


@dataclass(frozen=True)
class Resolved:
    """``addresses`` in the resolver's order; if empty, ``problem`` says why."""

    addresses: tuple[str, ...]
    problem: str = ""


class Names:
    """Looks up names one after the other, in a thread that starts with the first name.

    Args:
        clock: monotonic seconds.
        limit_s: a lookup that takes longer counts as failed, until its answer arrives.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, limit_s: float = 2.0) -> None:
        self._clock, self._limit_s = clock, limit_s
        self._lock = threading.Lock()
        self._found: OrderedDict[str, tuple[Resolved, float]] = OrderedDict()
        self._asked: dict[str, float] = {}
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def look_up(self, name: str) -> Resolved | None:
        """The answer for ``name``; None while it is being looked up: ask again. Never waits."""
        now = self._clock()
        with self._lock:
            known = self._found.get(name)
            if known is not None and now < known[1] + FRESH_S:
                return known[0]
            asked = self._asked.get(name)
            if asked is not None:
                late = now >= asked + self._limit_s
                return (
                    Resolved((), f"the resolver did not answer for {name} within {self._limit_s:g} s") if late else None
                )
            if len(self._asked) >= MAX_QUEUED:
                return Resolved((), f"{name[:80]} exceeds the limit of {MAX_QUEUED} queued name lookups")
            self._asked[name] = now
            self._queue.put(name)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pdtransport-names", daemon=True)
                self._thread.start()
        return None

    def close(self) -> None:
        """End the thread, after the names that are queued."""
        self._queue.put(None)

    def _run(self) -> None:
        while (name := self._queue.get()) is not None:
            found = _resolve(name)
            with self._lock:
                del self._asked[name]
                self._found[name] = found, self._clock()
                self._found.move_to_end(name)
                while len(self._found) > MAX_KNOWN:
                    self._found.popitem(last=False)


def _resolve(name: str) -> Resolved:
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Resolved((), f"{name} can't be resolved ({getattr(error, 'strerror', None) or error})")
    addresses = tuple(dict.fromkeys(str(answer[4][0]) for answer in answers))
    return Resolved(addresses) if addresses else Resolved((), f"{name} has no address")
