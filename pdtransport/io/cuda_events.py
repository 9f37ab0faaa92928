"""Calls that wait for work on a GPU.

An engine says that pages are computed when it has *launched* their computation; they are final once an event behind
that work has passed. The I/O thread keeps what was said until then, in order, and sleeps meanwhile: the GPU itself
wakes it.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdtransport.kv.geometry import HOST

logger = logging.getLogger(__name__)

MAX_WAITING = 1 << 14  # calls that wait for events; a GPU that is so far behind has hung


@dataclass
class _Entry:
    owner: object
    event: Any  # keeps it alive until it has passed
    handle: int  # 0: only waits for the entries before it
    call: Callable[[], None]


class CudaEventQueue:
    """Runs in the I/O thread.

    Args:
        device: number of the GPU; for host memory nothing ever waits.
    """

    def __init__(self, device: int) -> None:
        self._entries: deque[_Entry] = deque()
        self._waiting: Counter[int] = Counter()  # entries by id(owner)
        self._watch = None
        if device != HOST:
            from pdtransport.kernels.watch import EventWatch

            self._watch = EventWatch(device)

    def call(self, owner: object, event: Any | None, call: Callable[[], None]) -> int:
        """Run ``call`` once ``event`` (a ``torch.cuda.Event`` or ``cupy.cuda.Event``, recorded; None: nothing) has
        passed, and after what waits for the same ``owner``; at once where nothing is to wait for. The event's raw
        handle if it has to wait for that, else 0."""
        handle = 0
        if event is not None and self._watch is not None:
            handle = event_handle(event)
            if self._watch.passed(handle):
                handle = 0
        if not handle and not self._waiting[id(owner)]:
            call()
            return 0
        if len(self._entries) >= MAX_WAITING:
            raise RuntimeError(f"{MAX_WAITING} calls wait for the GPU, which does not get on")
        if handle:
            assert self._watch is not None
            self._watch.add(handle)
        self._entries.append(_Entry(owner, event, handle, call))
        self._waiting[id(owner)] += 1
        return handle

    def drop(self, owner: object) -> None:
        """Forget what waits for ``owner``."""
        if self._waiting.pop(id(owner), 0):
            self._entries = deque(entry for entry in self._entries if entry.owner is not owner)

    def run(self) -> bool:
        """Run what need not wait any longer, in order; True if anything was."""
        if self._watch is None or not self._entries:
            return False
        self._watch.clear()  # before looking: an event that passes now rings again
        ran = False
        while self._entries and (not self._entries[0].handle or self._watch.passed(self._entries[0].handle)):
            entry = self._entries.popleft()
            self._waiting[id(entry.owner)] -= 1
            if not self._waiting[id(entry.owner)]:
                del self._waiting[id(entry.owner)]
            ran = True
            try:
                entry.call()
            except Exception:
                logger.exception("error in a call that waited for the GPU")
        return ran

    @property
    def waiting(self) -> int:
        return len(self._entries)

    def descriptors(self) -> list[int]:
        return [self._watch.fileno()] if self._watch is not None and self._entries else []

    def flush(self) -> None:
        """Run everything, its events or not: the transport closes, and each request that waits must find its end."""
        entries, self._entries = self._entries, deque()
        self._waiting.clear()
        for entry in entries:
            entry.call()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()


def event_handle(event: Any) -> int:
    """The raw ``cudaEvent_t`` of torch's or cupy's event."""
    handle = getattr(event, "cuda_event", None)
    return int(event.ptr if handle is None else handle)
