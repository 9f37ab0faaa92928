"""The I/O thread: an event loop over sockets, link descriptors, timers, and calls posted from other threads."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol, TypeVar

import zmq

from pdtransport.errors import TimedOut, TransportClosed

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_POSTED_CALLS = 1 << 16  # calls that wait for the I/O thread; more mean that it is stuck
MAX_SLEEP_S = 1.0


class Work(Protocol):
    """The work that the event loop drives. All methods are called in the I/O thread."""

    def sockets(self) -> list[zmq.Socket[bytes]]: ...

    def descriptors(self) -> list[int]: ...

    def turn(self, now: float) -> bool:
        """Do what is due; True if there is more to do right away."""
        ...

    def arm(self) -> bool:
        """Called before the loop sleeps; False: there is work after all, don't sleep."""
        ...

    def next_deadline(self) -> float | None: ...

    def close(self) -> None: ...


class Reactor:
    """Runs a :class:`Work` in a daemon thread.

    Args:
        make: builds the work inside the I/O thread (ZeroMQ sockets must not change threads).
        name: name of the thread.
    """

    def __init__(self, make: Callable[[Reactor], Work], name: str) -> None:
        self._make = make
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._stopping = False
        self._woken = False  # a wake-up byte is sent or being sent: don't pay another system call
        self._poller = zmq.Poller()
        self._polled: list[int] | None = None  # what the poller watches besides the wake-up socket
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, timeout_s: float = 30.0) -> None:
        """Start the thread and wait until ``make`` has returned. Re-raises an exception of ``make``.

        Raises:
            TimedOut: ``make`` takes longer than ``timeout_s``; once it returns, its work is closed.
        """
        self._thread.start()
        try:
            self._started.result(timeout_s)
        except FutureTimeout:
            self._stopping = True
            raise TimedOut(f"the transport's I/O thread did not start within {timeout_s:g} s") from None

    def post(self, call: Callable[[], None], *, wake: bool = True) -> None:
        """Run ``call`` in the I/O thread; its exceptions are logged.

        With ``wake``, it runs soon; without, when the thread next wakes, within ``MAX_SLEEP_S``.

        Raises:
            TransportClosed: the thread has ended, or does not keep up.
        """
        if self._stopping:
            raise TransportClosed("the transport is closed")
        if len(self._calls) >= MAX_POSTED_CALLS:
            raise TransportClosed(f"the transport's I/O thread does not answer: {MAX_POSTED_CALLS} calls wait for it")
        self._calls.append(call)
        if wake:
            self.wake()

    def ask(self, call: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Run ``call`` in the I/O thread and return its result. In the I/O thread itself, it runs at once.

        Raises:
            TransportClosed: the thread has ended, or does not keep up.
            TimedOut: the thread did not answer in time. The call may still run later.
        """
        if threading.current_thread() is self._thread:
            return call()
        answer: Future[T] = Future()

        def answered() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:  # noqa: BLE001 - handed to the asking thread
                answer.set_exception(error)

        self.post(answered)
        try:
            return answer.result(timeout_s)
        except FutureTimeout:
            if answer.done():  # the call itself raised this
                raise
            if self._stopping:
                raise TransportClosed("the transport was closed meanwhile") from None
            raise TimedOut(f"the transport's I/O thread did not answer within {timeout_s:g} s") from None

    def wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        try:
            self._wake_in.send(b"\0")
        except BlockingIOError:  # the buffer is full of wake-ups already
            pass
        except OSError:
            if not self._stopping:
                raise

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the thread and close the work. Safe to call twice."""
        if not self._stopping:
            self._stopping = True
            self.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                logger.error("the I/O thread did not end within %s s", timeout_s)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        leave_pinned_cores()
        try:
            work = self._make(self)
        except BaseException as error:  # noqa: BLE001 - raised again by start()
            self._started.set_exception(error)
            self._close_wakeup()
            return
        self._started.set_result(None)
        try:
            while not self._stopping:
                self._one_turn(work)
        finally:
            while self._calls:
                self._drain_calls()
            work.close()
            self._close_wakeup()

    def _one_turn(self, work: Work) -> None:
        try:
            self._drain_calls()
            if work.turn(time.monotonic()) or self._calls or not work.arm():
                return
            self._sleep(work)
        except Exception:
            # A bug here must not crash the engine: its transfers end through their deadlines.
            logger.exception("error in the I/O thread")
            time.sleep(0.01)

    def _sleep(self, work: Work) -> None:
        items: list[zmq.Socket[bytes] | int] = [*work.sockets(), *work.descriptors()]
        names = [item if isinstance(item, int) else id(item) for item in items]
        if names != self._polled:  # ids stay unique: the poller holds the sockets
            self._polled, self._poller = names, zmq.Poller()
            for item in (self._wake_out, *items):
                self._poller.register(item, zmq.POLLIN)
        deadline = work.next_deadline()
        wait = MAX_SLEEP_S if deadline is None else min(MAX_SLEEP_S, max(0.0, deadline - time.monotonic()))
        self._poller.poll(max(1, round(wait * 1000)) if wait > 0 else 0)
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)  # bytes that are left wake the thread once more
        self._woken = False  # before _drain_calls(): a call posted from here on is seen there, or wakes us again

    def _drain_calls(self) -> None:
        """Run the calls posted until now. Later ones wait for the next turn, so they can't starve the rest."""
        for _ in range(len(self._calls)):
            call = self._calls.popleft()
            try:
                call()
            except Exception:
                logger.exception("error in a call to the I/O thread")

    def _close_wakeup(self) -> None:
        self._stopping = True
        self._wake_in.close()
        self._wake_out.close()


def leave_pinned_cores() -> None:
    """Let this thread run on any core that the process' cgroup allows, so that I/O stays out of the model's way.

    It inherits the affinity of the thread that started it, which the engine may have pinned to its compute cores.
    """
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    except (AttributeError, OSError):
        pass
