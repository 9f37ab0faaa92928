"""One store or load of a client: ask for windows of chunks, copy what is granted, publish or verify, let go.

Runs in a thread of the client's; the bytes go straight between the caller's memory and the pool's, in one pass that
also takes the checksums where they arrive.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pdtransport.errors import PoolUnavailable
from pdtransport.kernels.runs import Runs, merge_runs, stream_bytes
from pdtransport.pool import messages as say
from pdtransport.pool.codecs import Lossy
from pdtransport.pool.copiers import Copier, UnderWay
from pdtransport.pool.frames import frame_runs, frames_for
from pdtransport.pool.request import Part, Verdict
from pdtransport.pool.wire import Session
from pdtransport.protocol.messages import Message

WINDOWS = 3  # asked for at one time: while one is copied, the next are being granted


@dataclass
class Window:
    """A stretch ``first .. last`` of the operation's chunks, under one request."""

    number: int
    first: int
    last: int
    nbytes: int
    unanswered: int
    copying: int = 0  # batches
    published: deque[list[int]] = field(default_factory=deque)  # told and not yet confirmed, by message


@dataclass
class Batch:
    """Chunks whose copy is under way."""

    window: Window
    parts: list[Part]
    session: Session
    copy: UnderWay


@dataclass
class Operation:
    """What is to be done, and how to talk: ``ask`` a numbered message, the answers to which come through ``heard``;
    ``tell`` one; ``forget`` a number, and with True, cancel it."""

    storing: bool
    keys: Sequence[bytes]
    runs: Sequence[Runs]
    window_bytes: Callable[[], tuple[int, int]]  # of one window, of all; may raise PoolUnavailable
    number: Callable[[], int]
    ask: Callable[[Message, int], None]
    tell: Callable[[Session, Message], None]
    forget: Callable[[int, bool], None]
    after: Any | None = None  # an event, behind which a GPU's memory may be used
    lossy: Lossy | None = None  # how what is stored may be packed below memory
    heard: queue.SimpleQueue[Heard] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    _claim: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> bool:
        """Whether it is the caller's to end, which only one can: who runs it, or who gives it up."""
        return self._claim.acquire(blocking=False)

    def cancel(self) -> None:
        """Stop soon."""
        self.cancelled.set()
        self.heard.put((0, None, None))


Heard = tuple[int, Session | None, "say.FromPool | PoolUnavailable | None"]


class Copying:
    """Runs an operation. ``verdicts`` has one for each key, whatever happens."""

    def __init__(self, operation: Operation, copier: Copier) -> None:
        self._do, self._copier = operation, copier
        self._under_way: deque[Batch] = deque()
        self.sizes = [stream_bytes(runs) for runs in operation.runs]
        self.verdicts = [Verdict.LOST] * len(operation.keys)
        self.damaged = 0
        self.error = ""
        self._windows: dict[int, Window] = {}
        self._session: Session | None = None
        self._budget = 0  # bytes of all windows that are open
        self._stretches: Iterator[tuple[int, int]] = iter(())
        self._next: tuple[int, int] | None = None  # of the window to be opened next

    def run(self) -> None:
        """To the end, or until the deadline, the end of the service, or a cancellation; then nothing of the caller's
        memory or the pool's is touched any more."""
        if self._do.cancelled.is_set():
            return
        try:
            window_bytes, self._budget = self._do.window_bytes()
            self._stretches = self._cut(window_bytes)
            self._open_more()
            while self._windows and not self._do.cancelled.is_set():
                if self._under_way and self._do.heard.empty():
                    self._finish(self._under_way.popleft())
                else:
                    self._hear(*self._do.heard.get())
                if not self._do.cancelled.is_set():  # or a grant that was passed over would look done
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

    def _tidy(self) -> None:
        """Close windows of which all is done, and open others."""
        for number, window in list(self._windows.items()):
            if not (window.unanswered or window.copying or window.published):
                del self._windows[number]
                self._do.forget(number, False)
        self._open_more()

    def _open_more(self) -> None:
        """As many as can be answered meanwhile, and fit what this operation may hold together."""
        while sum(window.unanswered > 0 for window in self._windows.values()) < WINDOWS:
            self._next = self._next or next(self._stretches, None)
            if self._next is None:
                return
            held = sum(window.nbytes for window in self._windows.values())
            if self._windows and held + sum(self.sizes[slice(*self._next)]) > self._budget:
                return
            self._open(*self._next)
            self._next = None

    def _cut(self, window_bytes: int) -> Iterator[tuple[int, int]]:
        """Windows of at most so many bytes and keys; a larger chunk has one of its own."""
        first = nbytes = 0
        for last, size in enumerate(self.sizes):
            if last > first and (nbytes + size > window_bytes or last - first == say.MAX_KEYS):
                yield first, last
                first, nbytes = last, 0
            nbytes += size
        if self.sizes:
            yield first, len(self.sizes)

    def _open(self, first: int, last: int) -> None:
        number = self._do.number()
        keys = b"".join(self._do.keys[first:last])
        sizes = np.array(self.sizes[first:last], dtype="<u4").tobytes()
        self._windows[number] = Window(number, first, last, sum(self.sizes[first:last]), last - first)
        codec, grid = self._do.lossy or ("", None)
        if self._do.storing:
            self._do.ask(say.Store(request=number, keys=keys, sizes=sizes, codec=codec, grid=grid), number)
        else:
            self._do.ask(say.Load(request=number, keys=keys, sizes=sizes), number)

    def _hear(self, number: int, session: Session | None, message: say.FromPool | PoolUnavailable | None) -> None:
        if isinstance(message, PoolUnavailable):
            raise message
        window = self._windows.get(number)
        if window is None or session is None:
            return
        if self._session is None and session.enter():
            self._session = session
        if session is not self._session:  # frames of another run of the service are not these
            raise PoolUnavailable("the pool ended meanwhile")
        if isinstance(message, say.Answer):
            self._on_answer(window, message, session)
        elif isinstance(message, say.Done):
            self._on_done(window, message)

    def _on_answer(self, window: Window, answer: say.Answer, session: Session) -> None:
        granted: list[Part] = []
        for part in parts_of(answer, self.sizes, window.first, session.frame_bytes):
            window.unanswered -= 1
            if part.verdict in (Verdict.WRITE, Verdict.READ):
                granted.append(part)
            else:
                self.verdicts[window.first + part.place] = part.verdict
        for batch in self._batches(granted, window.first):
            if self._do.cancelled.is_set():
                return
            self._begin(window, batch, session)
            while len(self._under_way) >= self._copier.depth:
                self._finish(self._under_way.popleft())

    def _batches(self, parts: list[Part], first: int) -> Iterator[list[Part]]:
        """Parts of one length, not too many bytes together: each batch is one call of the copy kernel."""
        for size, alike in itertools.groupby(parts, key=lambda part: self.sizes[first + part.place]):
            group = list(alike)
            step = max(1, self._copier.batch_bytes // size)
            for start in range(0, len(group), step):
                yield group[start : start + step]

    def _begin(self, window: Window, parts: list[Part], session: Session) -> None:
        """Begin to copy a batch between the caller's memory and the pool's."""
        assert session.mapping is not None
        indices = [window.first + part.place for part in parts]
        ours = np.concatenate([self._do.runs[index] for index in indices])
        frames = b"".join(part.frames for part in parts)
        sizes = [self.sizes[index] for index in indices]
        theirs = merge_runs(frame_runs(session.mapping.address, frames, session.frame_bytes, sizes))
        copy = self._copier.begin(
            ours, theirs, len(parts), storing=self._do.storing, mapping=session.mapping, after=self._do.after
        )
        window.copying += 1
        self._under_way.append(Batch(window, parts, session, copy))

    def _finish(self, batch: Batch) -> None:
        checksums = batch.copy.wait().tolist()
        batch.window.copying -= 1
        (self._fill if self._do.storing else self._take)(batch.window, batch.parts, batch.session, checksums)

    def _fill(self, window: Window, batch: list[Part], session: Session, checksums: list[int]) -> None:
        window.published.append([part.place for part in batch])
        self._do.tell(session, say.Publish(request=window.number, indices=_indices(batch), checksums=_words(checksums)))

    def _on_done(self, window: Window, done: say.Done) -> None:
        """Chunks were published; Done messages come in the order of our Publish messages."""
        if not window.published:
            return  # about a damaged chunk
        indices = window.published.popleft()
        if done.count != len(indices):
            raise PoolUnavailable("the pool did not take what was written")
        for index in indices:
            self.verdicts[window.first + index] = Verdict.WRITE

    def _take(self, window: Window, batch: list[Part], session: Session, checksums: list[int]) -> None:
        for part, found in zip(batch, checksums, strict=True):
            good = found == part.checksum
            self.verdicts[window.first + part.place] = Verdict.READ if good else Verdict.MISS
            if not good:
                self.damaged += 1
                self._do.tell(session, say.Damaged(request=window.number, index=part.place))
        self._do.tell(session, say.Release(request=window.number, indices=_indices(batch)))


def parts_of(answer: say.Answer, sizes: Sequence[int], first: int, frame_bytes: int) -> Iterator[Part]:
    """The parts of an answer.

    Raises:
        PoolUnavailable: its arrays do not fit together: nothing of it may be used.
    """
    try:
        indices = np.frombuffer(answer.indices, dtype="<u4").tolist()
        checksums = np.frombuffer(answer.checksums, dtype="<u8").tolist()
        at = 0
        for index, code, checksum in zip(indices, answer.verdicts, checksums, strict=True):
            verdict = Verdict(code)
            end = at
            if verdict in (Verdict.WRITE, Verdict.READ):
                end += 4 * frames_for(sizes[first + index], frame_bytes)
            yield Part(index, verdict, checksum, answer.frames[at:end])
            at = end
    except (ValueError, IndexError) as error:
        raise PoolUnavailable(f"the pool's answer makes no sense: {error}") from None


def _indices(batch: list[Part]) -> bytes:
    return np.array([part.place for part in batch], dtype="<u4").tobytes()


def _words(numbers: list[int]) -> bytes:
    return np.array(numbers, dtype="<u8").tobytes()
