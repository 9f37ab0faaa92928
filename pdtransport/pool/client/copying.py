"""A client's store or load: request windows of chunks, copy granted chunks, then publish, or verify and release.

Runs in one of the client's copying threads. Bytes go directly between the caller's memory and the pool's, in one pass
that also computes the checksums of the copied bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pdtransport.errors import PoolUnavailable
from pdtransport.kernels.reference import Checksums
from pdtransport.pool import messages
from pdtransport.pool.client.copiers import Copier, UnderWay
from pdtransport.pool.core.chunks import Chunks, Codes, Granted, Heard, Numbers
from pdtransport.pool.core.frames import frame_runs
from pdtransport.pool.core.requests import KeyVerdict
from pdtransport.pool.local_wire import ServiceSession
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.protocol.messages import Message

WINDOWS = 3  # windows of full size that an operation may hold: while one is copied, the next are being granted
LOOK_S = 0.0001  # between polls of a copy in flight, while waiting for answers too


@dataclass
class CopyWindow:
    """Chunks ``first .. last - 1`` of an operation, sent as one request."""

    number: int
    first: int
    last: int
    nbytes: int
    unanswered: int  # chunks
    copying: int = 0  # batches in flight
    published: deque[Numbers] = field(default_factory=deque)  # places in each unconfirmed Publish message


@dataclass
class CopyBatch:
    """Chunks whose copy is in flight."""

    window: CopyWindow
    chunks: Granted
    session: ServiceSession
    copy: UnderWay


@dataclass
class Operation:
    """A store or load, and the calls by which it talks to the pool.

    Attributes:
        window_bytes: takes the copier's largest window; returns the bytes of one window, and of all open windows
            together. May raise PoolUnavailable.
        number: returns a new request number.
        ask: sends a request; its answers arrive in ``heard``.
        tell: sends a message without answer, or one whose answer arrives under the number of an open request.
        forget: ends a request number; with True, also cancels the request in the pool.
        heard: answers from the I/O thread.
    """

    storing: bool
    keys: Sequence[bytes]
    chunks: Chunks
    window_bytes: Callable[[int], tuple[int, int]]
    number: Callable[[], int]
    ask: Callable[[Message, int], None]
    tell: Callable[[ServiceSession, Message], None]
    forget: Callable[[int, bool], None]
    after: Any | None = None  # event after which the GPU's memory may be accessed
    lossy: Lossy | None = None  # how lower tiers may pack stored chunks
    heard: queue.SimpleQueue[Told] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    _claim: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> bool:
        """True for the first caller only, which must end the operation: the thread that runs it, or its expiry."""
        return self._claim.acquire(blocking=False)

    def cancel(self) -> None:
        """Ask the operation to stop; wakes it if it waits for answers."""
        self.cancelled.set()
        self.heard.put((0, None, None))


Told = tuple[int, ServiceSession | None, "messages.FromPool | PoolUnavailable | None"]


class Copying:
    """Runs an operation. ``verdicts`` always has a code for each key: LOST until the chunk is done."""

    def __init__(self, operation: Operation, copier: Copier) -> None:
        self._do, self._copier = operation, copier
        self._under_way: deque[CopyBatch] = deque()
        self.sizes = operation.chunks.sizes
        self._ends = np.cumsum(self.sizes)
        self.verdicts: Codes = np.full(len(operation.keys), KeyVerdict.LOST, dtype=np.uint8)
        self.damaged = 0
        self.error = ""
        self._windows: dict[int, CopyWindow] = {}
        self._session: ServiceSession | None = None
        self._budget = 0  # maximum bytes of all open windows together
        self._stretches: Iterator[tuple[int, int]] = iter(())
        self._next: tuple[int, int] | None = None  # first and last of the next window to open

    def run(self) -> None:
        """Run to completion, or until the deadline, the end of the service, or a cancellation.

        When this returns, nothing touches the caller's memory or the pool's any more.
        """
        if self._do.cancelled.is_set():
            return
        try:
            window_bytes, self._budget = self._do.window_bytes(self._copier.window_bytes)
            self._stretches = self._cut(window_bytes)
            self._open_more(1)
            time.sleep(LOOK_S)  # yields the GIL: the I/O thread sends the first request before the second is built
            self._open_more(2)  # the others once the first is answered: building them now would delay that answer
            while self._windows and not self._do.cancelled.is_set():
                self._step()
                if not self._do.cancelled.is_set():  # a cancelled operation skips grants: its windows only look done
                    self._tidy()
        except PoolUnavailable as error:
            self.error = str(error)
        finally:
            for batch in self._under_way:
                with suppress(PoolUnavailable):
                    batch.copy.wait()
            for number in self._windows:
                self._do.forget(number, True)
            if self._session is not None:
                self._session.leave()

    def _step(self) -> None:
        """Handle one message, or finish the oldest copy, whichever comes first.

        A grant must not wait until a copy ends, or the GPU would run out of work.
        """
        heard = self._do.heard
        if not self._under_way or not heard.empty():
            self._hear(*heard.get())
        elif not any(window.unanswered for window in self._windows.values()) or self._under_way[0].copy.done():
            self._finish(self._under_way.popleft())
        else:
            with suppress(queue.Empty):
                self._hear(*heard.get(timeout=LOOK_S))

    def _tidy(self) -> None:
        """Close finished windows and open further ones."""
        for number, window in list(self._windows.items()):
            if not (window.unanswered or window.copying or window.published):
                del self._windows[number]
                self._do.forget(number, False)
        self._open_more()

    def _open_more(self, most: int | None = None) -> None:
        """Open windows until ``most`` are unanswered (default: the copier's ``ahead``) or the budget is used up."""
        most = self._copier.ahead if most is None else most
        while sum(window.unanswered > 0 for window in self._windows.values()) < most:
            self._next = self._next or next(self._stretches, None)
            if self._next is None:
                return
            held = sum(window.nbytes for window in self._windows.values())
            if self._windows and held + self._bytes(*self._next) > self._budget:
                return
            self._open(*self._next)
            self._next = None

    def _bytes(self, first: int, last: int) -> int:
        """Bytes of chunks ``first .. last - 1``."""
        return int(self._ends[last - 1]) - (int(self._ends[first - 1]) if first else 0)

    def _cut(self, window_bytes: int) -> Iterator[tuple[int, int]]:
        """Cut the chunks into windows, as pairs of first and last.

        A window has at most ``window_bytes`` and ``MAX_KEYS`` chunks, and at least one chunk. The first one has the
        copier's ``first_bytes``; each later one is at most twice as long as all before it together.
        """
        count, first = len(self.sizes), 0
        while first < count:
            before = int(self._ends[first - 1]) if first else 0
            nbytes = min(window_bytes, max(self._copier.first_bytes, 2 * before))
            last = int(np.searchsorted(self._ends, before + nbytes, side="right"))
            last = min(max(last, first + 1), first + messages.MAX_KEYS)
            yield first, last
            first = last

    def _open(self, first: int, last: int) -> None:
        number = self._do.number()
        keys = b"".join(self._do.keys[first:last])
        sizes = self.sizes[first:last].astype("<u4").tobytes()
        self._windows[number] = CopyWindow(number, first, last, self._bytes(first, last), last - first)
        codec, grid = self._do.lossy or ("", None)
        if self._do.storing:
            self._do.ask(messages.Store(request=number, keys=keys, sizes=sizes, codec=codec, grid=grid), number)
        else:
            self._do.ask(messages.Load(request=number, keys=keys, sizes=sizes), number)

    def _hear(
        self, number: int, session: ServiceSession | None, message: messages.FromPool | PoolUnavailable | None
    ) -> None:
        if isinstance(message, PoolUnavailable):
            raise message
        window = self._windows.get(number)
        if window is None or session is None:
            return
        if self._session is None and session.enter():
            self._session = session
        if session is not self._session:  # frame ids of another run of the service mean other memory
            raise PoolUnavailable("the pool ended meanwhile")
        if isinstance(message, messages.KeyAnswers):
            self._on_answer(window, message, session)
        elif isinstance(message, messages.Done):
            self._on_done(window, message)

    def _on_answer(self, window: CopyWindow, answer: messages.KeyAnswers, session: ServiceSession) -> None:
        heard = Heard.of(answer, self.sizes[window.first : window.last], session.frame_bytes)
        window.unanswered -= len(heard.places)
        granted = (heard.codes == KeyVerdict.WRITE) | (heard.codes == KeyVerdict.READ)
        self.verdicts[window.first + heard.places[~granted]] = heard.codes[~granted]
        for batch in heard.granted.batches(self._copier.batch_bytes):
            if self._do.cancelled.is_set():
                return
            self._begin(window, batch, session)
            while len(self._under_way) >= self._copier.depth:
                self._finish(self._under_way.popleft())

    def _begin(self, window: CopyWindow, chunks: Granted, session: ServiceSession) -> None:
        """Start copying a batch between the caller's memory and the pool's."""
        assert session.mapping is not None
        ours = self._do.chunks.runs(window.first + chunks.places)
        theirs = frame_runs(session.mapping.address, chunks.frames, session.frame_bytes, chunks.sizes)
        copy = self._copier.begin(
            ours, theirs, len(chunks.places), storing=self._do.storing, mapping=session.mapping, after=self._do.after
        )
        window.copying += 1
        self._under_way.append(CopyBatch(window, chunks, session, copy))

    def _finish(self, batch: CopyBatch) -> None:
        checksums = batch.copy.wait()
        batch.window.copying -= 1
        (self._fill if self._do.storing else self._take)(batch.window, batch.chunks, batch.session, checksums)

    def _fill(self, window: CopyWindow, chunks: Granted, session: ServiceSession, checksums: Checksums) -> None:
        window.published.append(chunks.places)
        words = checksums.astype("<u8").tobytes()
        self._do.tell(session, messages.Publish(request=window.number, indices=_indices(chunks), checksums=words))

    def _on_done(self, window: CopyWindow, done: messages.Done) -> None:
        """Handle the confirmation of a Publish message. Done messages arrive in the order of the Publish messages."""
        if not window.published:
            return  # the answer to ChunkDamaged
        places = window.published.popleft()
        if done.count != len(places):
            raise PoolUnavailable("the pool refused the written chunks")
        self.verdicts[window.first + places] = KeyVerdict.WRITE

    def _take(self, window: CopyWindow, chunks: Granted, session: ServiceSession, checksums: Checksums) -> None:
        good = checksums == chunks.checksums
        self.verdicts[window.first + chunks.places] = np.where(good, KeyVerdict.READ, KeyVerdict.MISS)
        for place in chunks.places[~good].tolist():
            self.damaged += 1
            self._do.tell(session, messages.ChunkDamaged(request=window.number, index=place))
        self._do.tell(session, messages.ReleaseChunks(request=window.number, indices=_indices(chunks)))


def _indices(chunks: Granted) -> bytes:
    return chunks.places.astype("<u4").tobytes()
