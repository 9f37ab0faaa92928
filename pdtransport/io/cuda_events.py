"""A queue of calls that wait for CUDA events.

An engine reports pages as computed when it has *launched* their kernels; they are final only once an event recorded
behind the kernels has passed. This queue keeps the report until then, in order. The I/O thread sleeps meanwhile: the
GPU itself wakes it through a descriptor.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdtransport.kv.geometry import HOST

logger = logging.getLogger(__name__)

MAX_WAITING = 1 << 14  # calls that wait for events; a GPU that is this far behind has hung


@dataclass
class _Entry:
    owner: object
    event: Any  # referenced so that it lives until it has passed
    handle: int  # 0: waits only for the entries before it
    call: Callable[[], None]


class CudaEventQueue:
    """Runs calls once their CUDA events have passed; the calls of one owner in order. Used in the I/O thread only.

    Args:
        device: number of the GPU, or ``HOST``: then no call ever waits.
    """

    def __init__(self, device: int) -> None:
        self._entries: deque[_Entry] = deque()
        self._waiting: Counter[int] = Counter()  # entries by id(owner)
        self._watch = None
        if device != HOST:
            from pdtransport.kernels.watch import EventWatch

            self._watch = EventWatch(device)

    def call(self, owner: object, event: Any | None, call: Callable[[], None]) -> int:
        """Run ``call`` once ``event`` has passed and the earlier calls of the same ``owner`` have run.

        ``event`` is a recorded ``torch.cuda.Event`` or ``cupy.cuda.Event``; None: wait for earlier calls only. If there
        is nothing to wait for, ``call`` runs at once. Returns the event's raw handle if ``call`` waits for it, else 0.

        Raises:
            RuntimeError: ``MAX_WAITING`` calls wait already.
        """
        handle = 0
        if event is not None and self._watch is not None:
            handle = event_handle(event)
            if self._watch.passed(handle):
                handle = 0
        if not handle and not self._waiting[id(owner)]:
            call()
            return 0
        if len(self._entries) >= MAX_WAITING:
            raise RuntimeError(f"{MAX_WAITING} calls wait for the GPU, which makes no progress")
        if handle:
            assert self._watch is not None
            self._watch.add(handle)
        self._entries.append(_Entry(owner, event, handle, call))
        self._waiting[id(owner)] += 1
        return handle

    def drop(self, owner: object) -> None:
        """Drop all waiting calls of ``owner``."""
        if self._waiting.pop(id(owner), 0):
            self._entries = deque(entry for entry in self._entries if entry.owner is not owner)

    def run(self) -> bool:
        """Run the calls whose events have passed, in order; True if there were any."""
        if self._watch is None or not self._entries:
            return False
        self._watch.clear()  # before looking: an event that passes from here on signals again
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
        """Run all waiting calls now, even if their events have not passed, so that every request can end at close."""
        entries, self._entries = self._entries, deque()
        self._waiting.clear()
        for entry in entries:
            entry.call()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()


def event_handle(event: Any) -> int:
    """The raw ``cudaEvent_t`` of a torch or cupy event."""
    handle = getattr(event, "cuda_event", None)
    return int(event.ptr if handle is None else handle)
