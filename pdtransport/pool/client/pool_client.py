"""The pool's client API: store chunks, look keys up, load chunks, and ask administrative questions."""

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
from pdtransport.pool.core.budget import HARD, NO_PIN, SOFT
from pdtransport.pool.core.chunks import Chunks, Codes, verdicts_of
from pdtransport.pool.core.requests import KeyVerdict
from pdtransport.pool.local_wire import FOREVER_S, Asked, ServiceSession, Wire, now_plus
from pdtransport.pool.settings import STAGING_BYTES, PoolSettings
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.protocol.messages import Message
from pdtransport.settings import PoolUse, Settings

T = TypeVar("T")

PREPARED_LOOK_S = 0.02
GRACE_S = 60.0  # after the deadline, for a copy in flight to end: waiting longer would hide a bug
PINS = {"none": NO_PIN, "soft": SOFT, "hard": HARD}


class Pending(Generic[T]):
    """The future answer to a call. ``await pending`` or ``pending.result()`` waits for it.

    Cancelling a task that awaits a store or load does not stop the copy. Call :meth:`cancel`; the caller may reuse its
    memory once ``future`` is done.
    """

    def __init__(self, future: Future[T], deadline_s: float, cancel: Callable[[], None] | None = None) -> None:
        self.future = future
        self._deadline_s = deadline_s
        self._cancel = cancel

    def result(self) -> T:
        """Wait for the answer, which comes by the deadline, or when a copy in flight at the deadline has ended.

        Raises:
            PoolUnavailable: the pool did not answer. Stores and loads do not raise it; check their verdicts.
        """
        return self.future.result(self._deadline_s + GRACE_S)

    def cancel(self) -> None:
        """Cancel a store or load, which then ends soon. The caller may reuse its memory once there is a result."""
        if self._cancel is not None:
            self._cancel()

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        # Shielded: cancelling the awaiting task must not mark `future` as done while the copy continues.
        return (yield from asyncio.shield(asyncio.wrap_future(self.future)).__await__())


@dataclass(frozen=True)
class PrefixFound:
    """Result of a lookup: the first ``there`` keys are in the pool, ``in_memory`` of them in memory."""

    there: int
    in_memory: int


@dataclass(frozen=True)
class Copied:
    """Result of a store or load.

    Attributes:
        verdicts: one for each key: WRITE (stored by this call), HAVE (in the pool already) or READ (loaded and
            verified). With any other verdict the chunk was not moved.
        nbytes: bytes of the chunks that were moved.
        error: why the operation ended early; empty if it did not.
    """

    verdicts: tuple[KeyVerdict, ...]
    nbytes: int
    error: str = ""

    @property
    def prefix(self) -> int:
        """Number of leading keys whose chunks are in the pool after a store, or were loaded."""
        good = (KeyVerdict.WRITE, KeyVerdict.HAVE, KeyVerdict.READ)
        return next((n for n, verdict in enumerate(self.verdicts) if verdict not in good), len(self.verdicts))


class PoolClient:
    """A client of the pool ``name`` on this host, or of the pool at ``address`` on another host.

    All methods are thread-safe and return at once. The pool need not run: while it does not, calls fail at once with
    PoolUnavailable (stores and loads with verdicts LOST). A pool that starts later is found by the next call.

    Args:
        name, directory: of the pool (``pool.name``, ``pool.dir``).
        tenant: whose quota the chunks count against.
        deadline_s: default deadline of each call.
        threads: stores and loads that run at once. In host memory, each of them copies with two threads.
        device: number of the GPU whose memory chunks are copied from and to (-1: host memory). With a GPU, the pool's
            memory is registered with CUDA as soon as there is a pool; stores and loads wait for that.
        who: name shown in the pool's status. Default: program name and process id.
        address: ``tcp://HOST:PORT`` of a pool on another host.
        settings: for a pool on another host: CURVE keys, links, and this host's own address.
        staging_bytes: for a pool on another host: memory of this client through which its chunks pass.
        copies: for a pool on another host: open links when connected, not at the first store or load.
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
        self._guard = threading.Lock()  # guards the two attributes below, and the counters
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
        self._spare: SimpleQueue[Copier] = SimpleQueue()  # idle copiers; one exists for each thread
        for _ in range(threads):
            self._spare.put(make_copier(device))
        self._copiers = ThreadPoolExecutor(threads, thread_name_prefix="pdpool-copy", initializer=leave_pinned_cores)
        if device != HOST or address is not None:  # connect now, so that the first call need not wait for it
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
        """Look up the longest prefix of ``keys`` that can be loaded.

        One message carries up to 4096 keys; further keys are ignored.
        """
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
        """Copy chunks from the caller's memory into the pool.

        Chunks that the pool has are not copied again. If another client is storing a chunk, this call waits for it.
        The memory must not change until the result is available.

        Args:
            runs: memory of each chunk: (n, 2) uint64, address and bytes. ``runs[i]`` is stored under ``keys[i]``.
            lossy: lower tiers may pack the chunks with this codec, so that a later load gets different bytes. Only for
                keys of a :class:`~pdtransport.kv.keys.KeySpace` that names this ``codec``.
            after: on a GPU, an event of torch or cupy recorded after the kernels that fill the memory. The copy waits
                for the event.

        Raises:
            ValueError: a key is not 32 bytes long, a chunk is not a multiple of 8 bytes or is longer than 1 GiB, or
                the numbers of keys and chunks differ.
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
        """Copy chunk ``keys[i]`` from the pool into ``runs[i]`` and verify its checksum there.

        Only the memory of chunks with the verdict READ holds what was stored; all other memory has undefined content.

        Args:
            runs: memory of each chunk: (n, 2) uint64, address and bytes.
            after: on a GPU, an event recorded after the kernels that still use the memory. Nothing is written before
                the event.

        Raises:
            ValueError: as :meth:`store`.
        """
        return self._copy(False, keys, runs, deadline_s, after)

    # -- administration (see pdtransport.pool.admin.pool_admin) -----------------------------------------------------

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
        """Apply an action to up to 512 chunks; see :meth:`pdtransport.pool.server.admin_requests.AdminRequests.manage`.

        The answer is the number of chunks that it was applied to.
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
        """Describe the chunks of up to 4096 ``keys``.

        With ``keys`` None it is one slice of a sweep over all chunks, or all of ``tenant``, from index entry ``first``.
        """
        packed = b"".join(keys or ())
        return self._question(
            lambda number: messages.Look(request=number, keys=packed, sweep=keys is None, first=first, tenant=tenant),
            lambda answer: answer if isinstance(answer, messages.Looked) else None,
            deadline_s or self.deadline_s,
        )

    def count(self, first: int = 0, *, deadline_s: float | None = None) -> Pending[messages.Counted]:
        """Count chunks and bytes by tier and tenant, in one part of the index from entry ``first`` on."""
        return self._question(
            lambda number: messages.Count(request=number, first=first),
            lambda answer: answer if isinstance(answer, messages.Counted) else None,
            deadline_s or self.deadline_s,
        )

    def introduce(self, space: str) -> None:
        """Report this engine's key space to the pool, now and whenever the pool has restarted."""
        message = messages.Introduce(request=next(self._numbers), space=space)

        def say_it() -> None:
            self._wire.introduction = message
            session = self._wire.session
            if session is not None and session.mapping is not None:
                self._wire.tell(session, message)

        self._post(say_it)

    def watch(self, heard: Callable[[Sequence[bytes] | None], None]) -> None:
        """Report every chunk that leaves the pool from now on to ``heard``, in the client's I/O thread.

        The first call passes no keys: the watch has begun. The last call passes None: the pool ended or does not
        answer.
        """
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
        """The key spaces that engines have reported, as JSON texts, the latest first."""
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
        """Cancel stores and loads in flight and release all resources. Safe to call twice."""
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

    # -- implementation ----------------------------------------------------------------------------------------------

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
            # Wake the I/O thread of a remote pool's client: it frees staging frames that another copy may wait for.
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
        future.add_done_callback(lambda _: self._forget(operation))  # runs also if it is cancelled before it begins
        if waits:
            with suppress(PoolUnavailable):  # the client is being closed, which ends queued operations
                self._post(lambda: self._wire.at(deadline, lambda: self._expire(operation, future)))
        return Pending(future, seconds, operation.cancel)

    def _begin(self, operation: Operation, future: Future[Copied]) -> None:
        """Run an operation in a copying thread, unless it has expired or was cancelled."""
        if not operation.claim() or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._run(operation))
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    def _expire(self, operation: Operation, future: Future[Copied]) -> None:
        """End an operation that waited for a copying thread until its deadline: it touches no memory, now or later."""
        if operation.claim() and future.set_running_or_notify_cancel():
            busy = f"no answer within the deadline (all {self._threads} copying threads of this client were busy)"
            codes = np.full(len(operation.keys), KeyVerdict.LOST, dtype=np.uint8)
            self._count(operation, codes, 0, 0, busy)
            future.set_result(Copied(verdicts_of(codes), 0, busy))

    def _window(self, deadline: float, operation: Operation, most: int) -> tuple[int, int]:
        """Wait until copies can begin, and size an operation's requests.

        The sizes keep this client within what it may hold (``client_bytes``), and leave room in memory for chunks that
        are read from lower tiers.

        Returns:
            Bytes of one request, at most ``most``, and of all open requests of the operation together.

        Raises:
            PoolUnavailable: there is no pool, or copies can't begin.
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
