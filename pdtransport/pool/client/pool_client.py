"""The pool from a client's side: store chunks, look keys up, load chunks."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from pdtransport.errors import PoolUnavailable
from pdtransport.io.reactor import Reactor, leave_pinned_cores
from pdtransport.kernels.runs import Runs
from pdtransport.kv.geometry import HOST
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool import messages
from pdtransport.pool.client.copiers import Copier, make_copier
from pdtransport.pool.client.copying import WINDOWS, Copying, Operation
from pdtransport.pool.client.local_wire import FOREVER_S, Asked, ServiceSession, Wire, now_plus
from pdtransport.pool.core.budget import HARD, NO_PIN, SOFT
from pdtransport.pool.core.chunks import Chunks, Codes, verdicts_of
from pdtransport.pool.core.requests import KeyVerdict
from pdtransport.pool.settings import STAGING_BYTES, PoolSettings
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.protocol.messages import Message
from pdtransport.settings import PoolUse, Settings

T = TypeVar("T")

PREPARED_LOOK_S = 0.02
GRACE_S = 60.0  # beyond a deadline, for a copy under way: waiting longer would hide a bug
PINS = {"none": NO_PIN, "soft": SOFT, "hard": HARD}


class Pending(Generic[T]):
    """An answer on its way. ``await pending`` or ``pending.result()`` gives it.

    A task that is cancelled while it awaits a store or load does not end the copy: the memory is the caller's again
    when ``future`` is done, soon after :meth:`cancel`.
    """

    def __init__(self, future: Future[T], deadline_s: float, cancel: Callable[[], None] | None = None) -> None:
        self.future = future
        self._deadline_s = deadline_s
        self._cancel = cancel

    def result(self) -> T:
        """Wait for the answer, which comes by the deadline at the latest (a copy under way is finished first).

        Raises:
            PoolUnavailable: there is none; not raised for stores and loads, whose verdicts say it.
        """
        return self.future.result(self._deadline_s + GRACE_S)

    def cancel(self) -> None:
        """Stop soon. The caller's memory is its own again when the result is there."""
        if self._cancel is not None:
            self._cancel()

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        # shielded: a cancelled task must not make `future` look done while the copy goes on
        return (yield from asyncio.shield(asyncio.wrap_future(self.future)).__await__())


@dataclass(frozen=True)
class PrefixFound:
    """The first ``there`` keys are in the pool, ``in_memory`` of them in memory."""

    there: int
    in_memory: int


@dataclass(frozen=True)
class Copied:
    """How a store or load ended. ``verdicts`` has one for each key: WRITE (stored by this call) and HAVE (was there),
    or READ (copied and verified); all others mean that the chunk was not moved. ``error`` says why it ended early."""

    verdicts: tuple[KeyVerdict, ...]
    nbytes: int
    error: str = ""

    @property
    def prefix(self) -> int:
        """How many keys from the first on are in the pool now, or were loaded."""
        good = (KeyVerdict.WRITE, KeyVerdict.HAVE, KeyVerdict.READ)
        return next((n for n, verdict in enumerate(self.verdicts) if verdict not in good), len(self.verdicts))


class PoolClient:
    """A client of the pool ``name`` on this host, or of the one at ``address`` on another.

    All methods may be called from any thread, and return at once. No pool needs to run: whatever is asked meanwhile
    finds nothing, at once; a pool that comes up later is found.

    Args:
        name, directory: of the pool (``pool.name``, ``pool.dir``).
        tenant: whose quota the chunks count against.
        deadline_s: of each call that names no other.
        threads: stores and loads that run at once; in host memory, each copies with two threads.
        device: number of the GPU whose memory chunks are copied from and to (-1: host memory). Then the pool's memory
            is registered with CUDA as soon as there is a pool, and stores and loads wait for that.
        who: shown in the pool's status; default this program and its process id.
    """

    def __init__(
        self,
        name: str = "default",
        directory: Path | None = None,
        *,
        tenant: str = "",
        deadline_s: float = 10.0,
        threads: int = 2,
        who: str = "",
        device: int = HOST,
        address: str | None = None,
        settings: Settings | None = None,
        staging_bytes: int = STAGING_BYTES,
        copies: bool = True,
    ) -> None:
        place = PoolSettings(name=name) if directory is None else PoolSettings(name=name, dir=directory)
        who = (who or f"{Path(sys.argv[0]).name or 'python'}-{os.getpid()}")[:128]
        self.deadline_s = deadline_s
        self.counters: Counter[str] = Counter()
        self._numbers = itertools.count(1)
        self._guard = threading.Lock()  # of the two below and of the counters
        self._active: dict[int, Operation] = {}
        self._closing = False

        def make(reactor: Reactor) -> Wire:
            if address is None:
                self._wire = Wire(place.dir, name, who, tenant, device)
            else:
                from pdtransport.pool.remote.remote_wire import RemoteWire, host_and_port

                host, port = host_and_port(address)
                self._wire = RemoteWire(
                    host, port, settings or Settings(), who, tenant, device, staging_bytes, copies, reactor.post
                )
            return self._wire

        self._reactor = Reactor(make, name=f"pdpool-client-{name}")
        self._reactor.start()
        self._threads, self._device, self._remote = threads, device, address is not None
        self._spare: SimpleQueue[Copier] = SimpleQueue()  # one for each thread
        for _ in range(threads):
            self._spare.put(make_copier(device))
        self._copiers = ThreadPoolExecutor(threads, thread_name_prefix="pdpool-copy", initializer=leave_pinned_cores)
        if device != HOST or address is not None:  # the first one who asks should not wait for that
            self._question(lambda number: messages.Lookup(request=number, keys=b""), _found, deadline_s, counted=False)

    @classmethod
    def connect(cls, address: str, settings: Settings | None = None, **more: Any) -> PoolClient:
        """A client of the pool at ``address`` (``tcp://HOST:PORT``) on another host; the rest as in the constructor."""
        return cls(address=address, settings=settings, **more)

    @classmethod
    def of(cls, settings: Settings, use: PoolUse, **more: Any) -> PoolClient:
        """A client of the pool that an engine's settings name."""
        staging = use.staging_bytes
        return cls(use.name, use.dir, address=use.address, settings=settings, staging_bytes=staging, **more)

    # -- chunks ------------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> Pending[PrefixFound]:
        """How many of ``keys``, counted from the first, are in the pool: the longest prefix that can be loaded. One
        message for up to 4096 keys; more are not looked at."""
        packed = b"".join(keys[: messages.MAX_KEYS])
        return self._question(
            lambda number: messages.Lookup(request=number, keys=packed), _found, deadline_s or self.deadline_s
        )

    def store(
        self,
        keys: Sequence[bytes],
        runs: Sequence[Runs],
        *,
        lossy: Lossy | None = None,
        deadline_s: float | None = None,
        after: Any | None = None,
    ) -> Pending[Copied]:
        """Copy chunk ``i`` out of the memory ``runs[i]`` ((n, 2) uint64 of address and bytes) into the pool under
        ``keys[i]``. What is there already is not copied; a chunk that somebody else is storing is waited for.

        ``lossy``: tiers below memory may pack them with this codec, so that a later load gets bytes that differ. Only
        for keys of a :class:`~pdtransport.kv.keys.KeySpace` whose ``codec`` says so.

        The memory must not change until the result is there. On a GPU, ``after`` is an event (torch's or cupy's)
        recorded behind the kernels that fill it: it is read when that has passed.

        Raises:
            ValueError: a key is not 32 bytes long, a chunk not a multiple of 8 bytes or longer than 1 GiB, or there
                are not as many of them.
        """
        return self._copy(True, keys, runs, deadline_s, after, lossy)

    def load(
        self,
        keys: Sequence[bytes],
        runs: Sequence[Runs],
        *,
        deadline_s: float | None = None,
        after: Any | None = None,
    ) -> Pending[Copied]:
        """Copy the chunk ``keys[i]`` out of the pool into ``runs[i]`` and verify it there. Only chunks with the verdict
        READ hold what was stored; the memory of all others has undefined content. On a GPU, ``after`` is an event
        behind the kernels that still use this memory: nothing is written before it has passed.

        Raises:
            ValueError: as :meth:`store`.
        """
        return self._copy(False, keys, runs, deadline_s, after)

    # -- what people ask (see pdtransport.pool.admin.pool_admin) ---------------------------------------------------

    def manage(
        self,
        keys: Sequence[bytes],
        action: Literal["pin", "drop", "leave", "fetch", "hint", "write"],
        *,
        pin: Literal["none", "soft", "hard"] = "none",
        for_s: float | None = None,
        tier: str = "",
        again: bool = False,
        deadline_s: float | None = None,
    ) -> Pending[int]:
        """Do this to up to 512 chunks (see :meth:`pdtransport.pool.server.admin_requests.Control.manage`).

        The answer is to how many it was done.
        """
        return self._question(
            lambda number: messages.Manage(
                request=number, keys=b"".join(keys), action=action, pin=PINS[pin], for_s=for_s, tier=tier, again=again
            ),
            _count,
            deadline_s or self.deadline_s,
        )

    def look(
        self,
        keys: Sequence[bytes] | None,
        first: int = 0,
        *,
        tenant: str | None = None,
        deadline_s: float | None = None,
    ) -> Pending[messages.Looked]:
        """What the pool holds of up to 4096 ``keys``; None: of all, from place ``first`` on, and of one ``tenant``."""
        packed = b"".join(keys or ())
        return self._question(
            lambda number: messages.Look(request=number, keys=packed, sweep=keys is None, first=first, tenant=tenant),
            lambda answer: answer if isinstance(answer, messages.Looked) else None,
            deadline_s or self.deadline_s,
        )

    def count(self, first: int = 0, *, deadline_s: float | None = None) -> Pending[messages.Counted]:
        """How much the pool holds by tier and tenant, from place ``first`` of its index on."""
        return self._question(
            lambda number: messages.Count(request=number, first=first),
            lambda answer: answer if isinstance(answer, messages.Counted) else None,
            deadline_s or self.deadline_s,
        )

    def introduce(self, space: str) -> None:
        """Tell the pool of what the keys of this engine's chunks are made: now, and again whenever it starts anew."""
        message = messages.Introduce(request=next(self._numbers), space=space)

        def say_it() -> None:
            self._wire.introduction = message
            session = self._wire.session
            if session is not None and session.mapping is not None:
                self._wire.tell(session, message)

        self._post(say_it)

    def watch(self, heard: Callable[[Sequence[bytes] | None], None]) -> None:
        """Hear of every chunk that the pool forgets from now on, in the client's I/O thread: ``heard`` gets keys (none
        at first: the watch began); None once, when the pool ended or does not answer, and nothing after that."""
        number = next(self._numbers)

        def on_answer(_session: ServiceSession | None, answer: messages.FromPool | PoolUnavailable) -> bool:
            if not isinstance(answer, messages.Gone):
                heard(None)
                return True
            heard([answer.keys[i : i + KEY_BYTES] for i in range(0, len(answer.keys), KEY_BYTES)])
            return False

        asked = Asked(messages.WatchForgotten(request=number), number, now_plus(FOREVER_S), on_answer)
        self._post(lambda: self._wire.ask(asked))

    def spaces(self, *, deadline_s: float | None = None) -> Pending[tuple[str, ...]]:
        """What engines told it, the last one first."""
        return self._question(
            lambda number: messages.SpacesAsked(request=number),
            lambda answer: answer.spaces if isinstance(answer, messages.Spaces) else None,
            deadline_s or self.deadline_s,
        )

    def status(self, *, deadline_s: float | None = None) -> Pending[dict[str, Any]]:
        """The pool's sizes, clients and counters."""
        return self._question(
            lambda number: messages.PoolStatusRequest(request=number), _status, deadline_s or self.deadline_s
        )

    def close(self) -> None:
        """End what is under way and give everything back. Safe to call twice."""
        with self._guard:
            self._closing = True
            active = list(self._active.values())
        for operation in active:
            operation.cancel()
        self._copiers.shutdown(wait=True)
        while not self._spare.empty():
            self._spare.get().close()
        self._reactor.stop()

    def __enter__(self) -> PoolClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- how ---------------------------------------------------------------------------------------------------------

    def _question(
        self,
        make: Callable[[int], Message],
        read: Callable[[messages.FromPool], T | None],
        deadline_s: float,
        counted: bool = True,
    ) -> Pending[T]:
        future: Future[T] = Future()
        number = next(self._numbers)

        def heard(_session: ServiceSession | None, answer: messages.FromPool | PoolUnavailable) -> bool:
            if isinstance(answer, PoolUnavailable):
                with self._guard:
                    self.counters["unavailable"] += counted
                future.set_exception(answer)
                return True
            value = read(answer)
            if value is None:
                future.set_exception(PoolUnavailable(f"the pool answered with a {answer.kind}"))
            else:
                future.set_result(value)
            return True

        asked = Asked(make(number), number, now_plus(deadline_s), heard)
        self._post(lambda: self._wire.ask(asked))
        return Pending(future, deadline_s)

    def _copy(
        self,
        storing: bool,
        keys: Sequence[bytes],
        runs: Sequence[Runs],
        deadline_s: float | None,
        after: Any | None,
        lossy: Lossy | None = None,
    ) -> Pending[Copied]:
        if len(keys) != len(runs):
            raise ValueError(f"{len(keys)} keys for {len(runs)} chunks")
        if set(map(len, keys)) - {KEY_BYTES}:
            raise ValueError(f"a key must be {KEY_BYTES} bytes long")
        chunks = Chunks(runs)
        seconds = deadline_s or self.deadline_s
        deadline = now_plus(seconds)

        def ask(message: Message, number: int) -> None:
            def heard(session: ServiceSession | None, answer: messages.FromPool | PoolUnavailable) -> bool:
                operation.heard.put((number, session, answer))
                return isinstance(answer, PoolUnavailable)

            asked = Asked(message, number, deadline, heard)
            self._post(lambda: self._wire.ask(asked))

        operation = Operation(
            storing,
            list(keys),
            chunks,
            lambda most: self._window(deadline, operation, most),
            lambda: next(self._numbers),
            ask,
            lambda session, message: self._post(lambda: self._wire.tell(session, message)),
            # A remote pool's client gives frames of its staging memory back then, for which another copy may wait.
            lambda number, cancel: self._post(
                lambda: self._wire.forget(number, cancel=cancel), wake=cancel or self._remote
            ),
            after,
            lossy,
        )
        with self._guard:
            if self._closing:
                raise PoolUnavailable("the client is closed")
            waits = len(self._active) >= self._threads
            self._active[id(operation)] = operation
            future: Future[Copied] = Future()
            self._copiers.submit(self._begin, operation, future)
        future.add_done_callback(lambda _: self._forget(operation))  # also if it is cancelled before it began
        if waits:
            with suppress(PoolUnavailable):  # it is being closed, which ends what waits
                self._post(lambda: self._wire.at(deadline, lambda: self._expire(operation, future)))
        return Pending(future, seconds, operation.cancel)

    def _begin(self, operation: Operation, future: Future[Copied]) -> None:
        """In a copier's thread, unless it is over already."""
        if not operation.claim() or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._run(operation))
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    def _expire(self, operation: Operation, future: Future[Copied]) -> None:
        """It waited for a copier until its deadline: nothing of it was touched, and nothing will be."""
        if operation.claim() and future.set_running_or_notify_cancel():
            busy = f"no answer within the deadline (all {self._threads} copying threads of this client were busy)"
            codes = np.full(len(operation.keys), KeyVerdict.LOST, dtype=np.uint8)
            self._count(operation, codes, 0, 0, busy)
            future.set_result(Copied(verdicts_of(codes), 0, busy))

    def _window(self, deadline: float, operation: Operation, most: int) -> tuple[int, int]:
        """Bytes to ask for at one time (at most ``most``), and to hold together, so that what this client holds fits
        what it may, and a tier below memory finds room to bring chunks up to; when copies can begin.

        Raises:
            PoolUnavailable: there is no pool.
        """
        if self._wire.session is None or self._wire.session.mapping is None:
            left = max(0.01, deadline - now_plus(0))
            self._question(
                lambda number: messages.Lookup(request=number, keys=b""), _found, left, counted=False
            ).result()
        session = self._wire.session
        if session is None or session.mapping is None:
            raise PoolUnavailable("the pool ended")
        session.begin()
        while session.waits and not session.prepared.wait(PREPARED_LOOK_S):
            if operation.cancelled.is_set() or now_plus(0) > deadline:
                raise PoolUnavailable("copies can't begin yet: memory is being registered, or links opened")
        if session.waits and session.problem:
            raise PoolUnavailable(session.problem)
        share = session.client_bytes // self._threads
        return min(most, share // WINDOWS, session.memory_bytes // 8), min(share, session.memory_bytes // 2)

    def _run(self, operation: Operation) -> Copied:
        copier = self._spare.get()
        copying = Copying(operation, copier)
        try:
            copying.run()
        finally:
            self._spare.put(copier)
        codes = copying.verdicts
        moved = int(copying.sizes[(codes == KeyVerdict.WRITE) | (codes == KeyVerdict.READ)].sum())
        self._count(operation, codes, moved, copying.damaged, copying.error)
        return Copied(verdicts_of(codes), moved, copying.error)

    def _count(self, operation: Operation, codes: Codes, moved: int, damaged: int, error: str) -> None:
        what = "store" if operation.storing else "load"
        with self._guard:
            self.counters[f"{what}_bytes"] += moved
            self.counters["damaged"] += damaged
            self.counters["unavailable"] += bool(error)
            for code, times in enumerate(np.bincount(codes).tolist()):
                if times:
                    self.counters[f"{what}_{KeyVerdict(code).name.lower()}"] += times

    def _forget(self, operation: Operation) -> None:
        with self._guard:
            self._active.pop(id(operation), None)

    def _post(self, call: Callable[[], None], *, wake: bool = True) -> None:
        try:
            self._reactor.post(call, wake=wake)
        except RuntimeError:
            raise PoolUnavailable("the client is closed") from None


def _found(answer: messages.FromPool) -> PrefixFound | None:
    return PrefixFound(answer.there, answer.in_memory) if isinstance(answer, messages.LookupReply) else None


def _count(answer: messages.FromPool) -> int | None:
    return answer.count if isinstance(answer, messages.Done) else None


def _status(answer: messages.FromPool) -> dict[str, Any] | None:
    return json.loads(answer.status) if isinstance(answer, messages.Status) else None  # type: ignore[no-any-return]
