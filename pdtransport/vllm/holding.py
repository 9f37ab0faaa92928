"""A step that began before its request's pages is held until they are there: its thread before the forward pass is
launched, or only its GPU, behind which the forward pass is launched meanwhile.

Launching takes as long as a step's computing without CUDA graphs (26 ms for 32 layers on one machine), 2 ms with them.
The GPU's stream waits at a barrier that the I/O thread opens when the last page is verified; the worker's thread waits
once all is launched, so that the step's report says how it went, as without a barrier.

A launch may itself wait for the stream: of a kernel that was never launched before (CUDA loads it then), of more than
some thousand kernels, of memory being freed. Then nobody would open the barrier, for the I/O thread's launches wait
with it. So a thread watches over it: it opens the barrier in time, and the step counts as one whose pages did not come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

logger = logging.getLogger(__name__)

HOLD_S = 3.0  # a step gives its request's pages up then; a peer that is dead or stands still is noticed before
REWIND_S = 10.0  # the I/O thread must let go of pages within this, or the engine may not overwrite them
LAUNCH_S = 0.25  # launching a step behind a barrier takes no longer, unless it waits for the barrier
MOST_STUCK = 3  # times that it did; no barriers are used after that


class ModelStream(Protocol):
    """The stream of the GPU that this thread launches the model on."""

    def close(self) -> int:
        """Let it wait behind what is launched; the ticket for :meth:`open`.

        Raises:
            RuntimeError: it does not wait.
        """

    def open(self, ticket: int) -> None:
        """Let it go on. Called by any thread."""


class Arrival:
    """Pages of one request on their way; its fields are :class:`Holding`'s."""

    def __init__(self) -> None:
        self.noted = threading.Event()
        self.ended: float | None = None  # time.monotonic
        self.ticket: int | None = None  # of the barrier that waits for it
        self.given_up = False  # the barrier was opened before


class Holding:
    """Holds a worker's steps.

    Args:
        cancel: gives a request's transfer up, for a reason; called by any thread.
        told: hears for how many seconds a request's pages were waited for; negative: they were there before that.
    """

    def __init__(self, cancel: Callable[[str, str], None], told: Callable[[str, float], None]) -> None:
        self._cancel, self._told = cancel, told
        self._stream: ModelStream | None = None
        self._lock = threading.Lock()
        self._arrivals: dict[str, Arrival] = {}
        self._last: tuple[str, float] | None = None  # request whose pages ended last, and when
        self._held: tuple[str, Arrival] | None = None  # whose step is being launched behind a closed barrier
        self._watchdog: _Watchdog | None = None
        self._stuck = 0

    def use(self, stream: ModelStream) -> None:
        """Hold the GPU from now on, where a step allows it."""
        self._stream, self._watchdog = stream, _Watchdog(self._launch_is_stuck)

    # -- of transfers ------------------------------------------------------------------------------------------------

    def coming(self, req_id: str) -> Arrival:
        """A request's pages are on their way."""
        arrival = self._arrivals[req_id] = Arrival()
        return arrival

    def ended(self, arrival: Arrival) -> bool:
        """The transfer has ended, well or not: the GPU goes on. False: it went on before, and may have read what was
        not there yet."""
        with self._lock:
            arrival.ended = time.monotonic()
            self._open(arrival)
            return not arrival.given_up

    def noted(self, req_id: str, arrival: Arrival) -> None:
        """What is to be reported of the transfer will be."""
        with self._lock:
            if self._arrivals.get(req_id) is arrival:
                del self._arrivals[req_id]
            if arrival.ended is not None:
                self._last = req_id, arrival.ended
        arrival.noted.set()

    # -- of steps, by the worker's thread ----------------------------------------------------------------------------

    def before_forward(self, req_ids: Sequence[str], ahead: bool) -> None:
        """``ahead``: what these requests' step launches was launched before, for another one like it.

        Raises:
            RuntimeError: the I/O thread does not let go of the pages.
        """
        for req_id in req_ids:
            with self._lock:
                arrival, last = self._arrivals.get(req_id), self._last
            if arrival is None:
                came = last[1] - time.monotonic() if last is not None and last[0] == req_id else 0.0
                self._told(req_id, came)
            elif ahead and len(req_ids) == 1 and self._close(arrival):
                self._held = req_id, arrival
            else:
                self._wait(req_id, arrival)

    def launched(self) -> None:
        """The step that was to be held is launched; returns when its pages have found their end.

        Raises:
            RuntimeError: the I/O thread does not let go of the pages.
        """
        held, self._held = self._held, None
        if held is not None:
            if self._watchdog is not None:
                self._watchdog.call_off()
            self._wait(*held)

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        held = self._held
        if held is not None:
            self._give_up(held[1])

    def _close(self, arrival: Arrival) -> bool:
        """Whether the stream waits for it now."""
        if self._stream is None or self._watchdog is None:
            return False
        with self._lock:
            if arrival.ended is not None:
                return False
            try:
                arrival.ticket = self._stream.close()
            except RuntimeError as error:
                logger.warning("steps are held before they are launched from now on: %s", error)
                self._stream = None
                return False
        self._watchdog.watch(LAUNCH_S)
        return True

    def _wait(self, req_id: str, arrival: Arrival) -> None:
        began = time.monotonic()
        if not arrival.noted.wait(HOLD_S):
            self._give_up(arrival)
            self._cancel(req_id, f"its pages did not come within {HOLD_S:g} s of when they were expected")
            if not arrival.noted.wait(REWIND_S):
                raise RuntimeError(f"request {req_id}: the I/O thread did not let go of its pages in {REWIND_S:g} s")
        self._told(req_id, (arrival.ended or began) - began)

    def _give_up(self, arrival: Arrival) -> None:
        with self._lock:
            if arrival.ended is None and arrival.ticket is not None:
                arrival.given_up = True
                self._open(arrival)

    def _open(self, arrival: Arrival) -> None:
        if arrival.ticket is not None and self._stream is not None:
            self._stream.open(arrival.ticket)

    def _launch_is_stuck(self) -> None:
        held = self._held
        if held is None or held[1].ended is not None:
            return
        self._give_up(held[1])
        self._stuck += 1
        logger.warning(
            "request %s: launching its first step waited for the GPU, which waited for its pages (%d of %d times after "
            "which steps are held before they are launched)",
            held[0], self._stuck, MOST_STUCK,
        )  # fmt: skip
        if self._stuck >= MOST_STUCK:
            self._watchdog, watchdog = None, self._watchdog  # no step is held with a barrier without it
            assert watchdog is not None
            watchdog.close()
        self._cancel(held[0], "launching its first step took too long")


class _Watchdog:
    """Calls ``bark`` in a thread of its own unless it is called off in time.

    Watching and calling off wake nobody while it sleeps through an earlier watch: a thread that wakes wants the
    interpreter, from one that launches.
    """

    def __init__(self, bark: Callable[[], None]) -> None:
        self._bark = bark
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._asleep = False  # until somebody wakes it
        self._closed = False
        threading.Thread(target=self._run, name="pdtransport-watchdog", daemon=True).start()

    def watch(self, seconds: float) -> None:
        with self._changed:
            self._deadline = time.monotonic() + seconds
            if self._asleep:
                self._changed.notify()

    def call_off(self) -> None:
        with self._changed:
            self._deadline = None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._asleep = self._deadline is None
                if self._deadline is None:
                    self._changed.wait_for(lambda: self._closed or self._deadline is not None)
                self._asleep = False
                if self._closed:
                    return
                assert self._deadline is not None
                left = self._deadline - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._deadline = None
            self._bark()
