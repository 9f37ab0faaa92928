"""A step that began before its request's pages is held until they are there: its thread before the forward pass is
launched, or only its GPU, behind which the forward pass is launched meanwhile.

Launching takes as long as a step's computing without CUDA graphs (26 ms for 32 layers on one machine), 2 ms with them.
The GPU's stream waits at a barrier that the I/O thread opens when the last page is verified; the worker's thread waits
once all is launched, so that the step's report says how it went, as without a barrier.

A launch may itself wait for the stream (:class:`pdtransport.kernels.barrier.Barrier` says which), and the I/O thread's
with it; and pages may be late. So a barrier opens by itself after ``BARRIER_S``. Then the step ran over what was not
there: it is void, whatever becomes of the pages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger(__name__)

HOLD_S = 3.0  # a step gives its request's pages up then; a peer that is dead or stands still is noticed before
REWIND_S = 10.0  # the I/O thread must let go of pages within this, or the engine may not overwrite them
BARRIER_S = 0.15  # launching takes 30 ms, and pages are expected soon after
MOST_STUCK = 3  # launches in a row that took so long; then no barriers are used any more


class ModelStream(Protocol):
    """The stream of the GPU that this thread launches the model on."""

    def close(self, seconds: float) -> int:
        """Let it wait behind what is launched, so long at most; the ticket for :meth:`open`.

        Raises:
            RuntimeError: it does not wait.
        """

    def open(self, ticket: int) -> bool:
        """Let it go on. Called by any thread. False: it went on before."""


class Owner(Protocol):
    """Whose steps are held."""

    def give_up(self, req_id: str, reason: str) -> None:
        """End this request's transfer, if it is under way."""

    def held(self, req_id: str, seconds: float, *, void: bool, usual: bool) -> None:
        """A request's step waited so long for its pages; negative: they were there so long before. ``void``: it was
        computed without them. ``usual``: steps like it will be held in the same way."""


class Arrival:
    """Pages of one request on their way; its fields are :class:`Holding`'s."""

    def __init__(self) -> None:
        self.noted = threading.Event()
        self.ended: float | None = None  # time.monotonic
        self.barrier: tuple[ModelStream, int] | None = None  # that waits for it, and its ticket
        self.void = False

    def let_go(self) -> bool:
        """The GPU goes on, if it waits for these; False: it went on before."""
        if self.barrier is None:
            return True
        stream, ticket = self.barrier
        return stream.open(ticket)


@dataclass
class _Launching:
    """A step behind a closed barrier."""

    req_id: str
    arrival: Arrival
    began: float


class Holding:
    """Holds a worker's steps, for its ``owner``."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._stream: ModelStream | None = None
        self._arrivals: dict[str, Arrival] = {}
        self._last: tuple[str, float] | None = None  # request whose pages ended last, and when
        self._launching: _Launching | None = None
        self._stuck = 0

    def use(self, stream: ModelStream) -> None:
        """Hold the GPU from now on, where a step allows it."""
        self._stream = stream

    # -- of transfers, by any thread ---------------------------------------------------------------------------------

    def coming(self, req_id: str) -> Arrival:
        """A request's pages are on their way."""
        arrival = Arrival()
        with self._lock:
            self._arrivals[req_id] = arrival
        return arrival

    def ended(self, arrival: Arrival) -> bool:
        """The transfer has ended, well or not: the GPU goes on. False: it went on before."""
        with self._lock:
            if arrival.ended is None:
                arrival.void = not arrival.let_go()
                arrival.ended = time.monotonic()
            return not arrival.void

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
                self._owner.held(req_id, came, void=False, usual=True)
            elif not (ahead and len(req_ids) == 1 and self._close(req_id, arrival)):
                self._wait(req_id, arrival, usual=self._stream is None)

    def after_launch(self) -> None:
        """The step that was to be held is launched; returns when its pages have found their end.

        Raises:
            RuntimeError: the I/O thread does not let go of the pages.
        """
        step, self._launching = self._launching, None
        if step is None:
            return
        stuck = time.monotonic() - step.began > BARRIER_S
        self._stuck = self._stuck + 1 if stuck else 0
        if stuck:
            logger.warning(
                "request %s: launching its first step took over %g s behind a barrier (%d in a row; %d end barriers)",
                step.req_id,
                BARRIER_S,
                self._stuck,
                MOST_STUCK,
            )
            if self._stuck == MOST_STUCK:
                self._stream = None
        self._wait(step.req_id, step.arrival, usual=not stuck)

    def close(self) -> None:
        """Leaves no stream waiting."""
        with self._lock:
            step, self._launching = self._launching, None
            if step is not None:
                step.arrival.let_go()

    def _close(self, req_id: str, arrival: Arrival) -> bool:
        """Whether the stream waits for it now."""
        with self._lock:
            if self._stream is None or arrival.ended is not None:
                return False
            try:
                arrival.barrier = self._stream, self._stream.close(BARRIER_S)
            except RuntimeError as error:
                logger.warning("steps are held before they are launched from now on: %s", error)
                self._stream = None
                return False
            self._launching = _Launching(req_id, arrival, time.monotonic())
            return True

    def _wait(self, req_id: str, arrival: Arrival, usual: bool) -> None:
        began = time.monotonic()
        if not arrival.noted.wait(HOLD_S):
            self._owner.give_up(req_id, f"its pages did not come within {HOLD_S:g} s of when they were expected")
            if not arrival.noted.wait(REWIND_S):
                raise RuntimeError(f"request {req_id}: the I/O thread did not let go of its pages in {REWIND_S:g} s")
        ended = began if arrival.ended is None else arrival.ended
        self._owner.held(req_id, ended - began, void=arrival.void, usual=usual)
