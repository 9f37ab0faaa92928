"""The pool service: one ROUTER socket in a private directory, and one I/O thread that drives the chunk store.

Chunk bytes never pass through this thread: clients copy between their own memory and the pool's shared memory.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from pdtransport.control.limits import MAX_FRAMES_A_TURN
from pdtransport.control.shared import complaints_about_peers
from pdtransport.control.sockets import Inbox, Letter, Socket, open_socket
from pdtransport.errors import SettingsError
from pdtransport.io.reactor import Reactor
from pdtransport.kernels.quant import Grid
from pdtransport.kv.fingerprint import plain
from pdtransport.pool import messages
from pdtransport.pool.core.chunks import answer_of, granted
from pdtransport.pool.core.index import MEMORY
from pdtransport.pool.core.locks import SERVICE_BYTE, LockFile, private_directory
from pdtransport.pool.core.requests import ClientSession, Grants, KeyAnswer, PoolRequest
from pdtransport.pool.core.shared_memory import Mapping, make_memory, map_memory
from pdtransport.pool.core.store import ChunkStore
from pdtransport.pool.server.admin_requests import AdminRequests
from pdtransport.pool.server.key_space_file import SpaceFile, spaces_path
from pdtransport.pool.server.open_tiers import lower_tiers
from pdtransport.pool.server.tier_threads import Mover, checksum_of
from pdtransport.pool.settings import MAX_CHUNK_BYTES, PoolSettings
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.protocol.messages import Message, WireError
from pdtransport.settings import ControlSettings

if TYPE_CHECKING:
    from pdtransport.pool.admin.http_api import PoolApi
    from pdtransport.pool.remote.remote_server import Agent

logger = logging.getLogger("pdtransport.pool")

MAX_CLIENTS = 1024
MAX_REQUESTS = 4096  # open requests of one client
ANSWER_FRAME_IDS = 512 << 10  # frame ids in one answer: 2 MiB, half of the longest message
TICK_S = 0.25  # between checks of which clients are alive

CONTROL = ControlSettings(max_frame_bytes=messages.MAX_FRAME_BYTES)


@dataclass
class Client:
    """A client from its Hello until it says Bye or its process ends."""

    session: ClientSession
    lock: int
    group: int

    @property
    def route(self) -> bytes:
        return self.session.route


class PoolService:
    """Serves clients on this host; driven by a :class:`Reactor`. The constructor opens everything.

    Raises:
        SettingsError: another pool of this name runs here, its memory can't be allocated, or a directory can't be
            used.
    """

    def __init__(self, settings: PoolSettings, reactor: Reactor) -> None:
        self.settings = settings
        private_directory(settings.dir)
        self._lock = LockFile(settings.lock_path, make=True)
        self._context: zmq.Context[Socket] = zmq.Context(1)
        self._socket: Socket | None = None
        self._memory: Mapping | None = None
        self._mover: Mover | None = None
        self._memory_fd = -1
        self._spaces = SpaceFile(spaces_path(settings))
        try:
            if not self._lock.take(SERVICE_BYTE):
                raise SettingsError(
                    f"pool.name: a pool {settings.name!r} already runs in {settings.dir}: choose another name"
                )
            self._memory_path, self._memory_fd, nbytes = make_memory(settings)
            self._memory = memory = Mapping(self._memory_fd, nbytes)
            frame_bytes = settings.frame_bytes

            def verify(frames: bytes, nbytes: int, checksum: int) -> bool:
                return checksum_of(memory, frames, nbytes, frame_bytes) == checksum

            self.store = ChunkStore(settings, nbytes // frame_bytes, verify, lower_tiers(settings, MEMORY << 1))
            self._control = AdminRequests(self.store, self._spaces)
            self._socket = open_socket(self._context, zmq.ROUTER, CONTROL, ipv6=False)
            self._socket.bind(f"ipc://{settings.socket_path}")
            settings.socket_path.chmod(0o600)  # in addition to the directory, which is closed to other users
            self._inbox = Inbox(self._socket, addressed=True)
            self._mover = Mover(self.store, memory, reactor.post)
        except BaseException:
            self.close()
            raise
        self._clients: dict[bytes, Client] = {}
        self._watchers: dict[bytes, int] = {}  # route -> number of its WatchForgotten request
        self._complaints = complaints_about_peers()
        self._tick_at = 0.0
        self._paused = False
        self.counters: Counter[str] = Counter()

    # -- called by the reactor --------------------------------------------------------------------------------------

    def sockets(self) -> list[Socket]:
        return [self._open_socket]

    def descriptors(self) -> list[int]:
        return []

    def arm(self) -> bool:
        self._flush()  # answers and jobs that reports from lower tiers have caused
        return not int(self._open_socket.get(zmq.EVENTS)) & zmq.POLLIN

    def next_deadline(self) -> float | None:
        return self._tick_at

    def turn(self, now: float) -> bool:
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            self._bury_the_dead()
            self.store.budget.tick(now)
            self.store.hints.tick(now)
        for _ in range(MAX_FRAMES_A_TURN):
            letter = self._inbox.read()
            if not letter:
                self._flush()
                return False
            if isinstance(letter, Letter):
                self._on_letter(letter, now)
                self._flush()  # after each message, so that clients begin to copy on the first answer
            if self._paused:
                break
        self._paused = False
        return True

    def close(self) -> None:
        """End the service. Clients notice the disconnect; the memory stays mapped in them until they unmap it."""
        if self._mover is not None:
            self._mover.close()
        if self._socket is not None:
            self._socket.close(0)
            self.settings.socket_path.unlink(missing_ok=True)
        self._context.term()
        self._spaces.close()
        if self._memory_fd >= 0:
            self._memory_path.unlink(missing_ok=True)
            os.close(self._memory_fd)
            self._memory_fd = -1
        if self._memory is not None and (self._mover is None or self._mover.ended):
            self._memory.close()
        self._lock.close()

    def share_memory(self) -> Mapping:
        """Map the pool's memory as a client in this process does."""
        assert self._memory is not None
        return map_memory(self._memory_path, self._memory.nbytes)

    @property
    def _open_socket(self) -> Socket:
        assert self._socket is not None
        return self._socket

    # -- messages from clients --------------------------------------------------------------------------------------

    def _on_letter(self, letter: Letter, now: float) -> None:
        client = self._clients.get(letter.sender)
        try:
            if letter.body is None:
                raise WireError("a message of several parts")
            message = messages.from_client(letter.body.bytes)
            if isinstance(message, messages.PoolHello):
                self._on_hello(letter.sender, message)
            elif client is None:
                number = getattr(message, "request", 0)
                self._send(letter.sender, messages.PoolRefused(request=number, what="hello", reason="say Hello first"))
            else:
                self._on_message(client, message, now)
        except (WireError, RecursionError) as error:
            self.counters["garbage"] += 1
            text = plain(str(error), 300)
            self._complaints.warn(f"garbage from a client of pool {self.settings.name}: {text}", "", now)
            self._send(letter.sender, messages.PoolRefused(what="message", reason=text))

    def _on_hello(self, route: bytes, hello: messages.PoolHello) -> None:
        reason = ""
        if route in self._clients:
            reason = "Hello was already sent on this connection"
        elif len(self._clients) >= MAX_CLIENTS:
            reason = f"{MAX_CLIENTS} clients are connected, the maximum"
        elif any(client.lock == hello.lock for client in self._clients.values()) or not self._lock.held(hello.lock):
            reason = (
                f"this client does not hold byte {hello.lock} of the lock file: it must use the pool's own directory"
            )
        if reason:
            self._send(route, messages.PoolRefused(what="client", reason=reason))
            return
        session = ClientSession(plain(hello.name, 128), route)
        self._clients[route] = Client(session, hello.lock, self.store.budget.group_of(hello.tenant))
        assert self._memory is not None
        self._send(
            route,
            messages.PoolWelcome(
                memory=str(self._memory_path),
                nbytes=self._memory.nbytes,
                frame_bytes=self.settings.frame_bytes,
                client_bytes=self.settings.client_bytes,
            ),
        )

    def _on_message(self, client: Client, message: Message, now: float) -> None:
        store, session = self.store, client.session
        if isinstance(message, messages.Lookup):
            there, in_memory = store.lookup(message.keys)
            self._send(client.route, messages.LookupReply(request=message.request, there=there, in_memory=in_memory))
        elif isinstance(message, messages.Store | messages.Load):
            self._on_request(client, message)
        elif isinstance(message, messages.Publish):
            request = session.requests.get(message.request)
            pairs = zip(_numbers(message.indices, "<u4"), _numbers(message.checksums, "<u8"), strict=True)
            done = store.publish(request, list(pairs)) if request else 0
            if request:
                self._tidy(request)
            self._send(client.route, messages.Done(request=message.request, count=done))
        elif isinstance(message, messages.ReleaseChunks):
            request = session.requests.get(message.request)
            if request is not None:
                store.release(request, _numbers(message.indices, "<u4"))
                self._tidy(request)
        elif isinstance(message, messages.ChunkDamaged):
            request = session.requests.get(message.request)
            dropped = store.damaged(request, message.index) if request else False
            self._send(client.route, messages.Done(request=message.request, count=int(dropped)))
        elif isinstance(message, messages.CancelRequest):
            request = session.requests.pop(message.request, None)
            if request is not None:
                store.cancel(request)
        elif isinstance(message, messages.PoolStatusRequest):
            self._send(client.route, messages.Status(request=message.request, status=json.dumps(self.status())))
        elif isinstance(message, messages.Bye):
            self._end(client)
        else:
            self._on_control(client, message, now)

    def _on_control(self, client: Client, message: Message, now: float) -> None:
        """Handle an administrative message.

        Each ends the turn, so that queued loads and stores don't wait behind several of them.
        """
        assert self._mover is not None
        self._paused = True
        number: int = getattr(message, "request", 0)
        try:
            if isinstance(message, messages.Manage):
                answer: Message = messages.Done(request=number, count=self._control.manage(message, now))
            elif isinstance(message, messages.Look):
                answer = self._control.look(message, self._mover.backlog)
            elif isinstance(message, messages.WatchForgotten):
                self._watchers[client.route] = number
                self.store.gone = self.store.gone or []
                answer = messages.Gone(request=number, keys=b"")
            elif isinstance(message, messages.Count):
                answer = self._control.count(message)
            elif isinstance(message, messages.Introduce):
                self._control.introduce(message.space)
                answer = messages.Done(request=number, count=1)
            else:
                answer = messages.Spaces(request=number, spaces=self._control.spaces())
        except WireError as error:  # a valid message that asks for something this pool can't do
            answer = messages.PoolRefused(request=number, what="wish", reason=str(error))
        self._send(client.route, answer)

    def _on_request(self, client: Client, message: messages.Store | messages.Load) -> None:
        requests, sizes = client.session.requests, _numbers(message.sizes, "<u4")
        if message.request in requests or len(requests) >= MAX_REQUESTS:
            raise WireError(f"request {message.request} is already in progress, or {MAX_REQUESTS} others are")
        if any(size % 8 or not 0 < size <= MAX_CHUNK_BYTES for size in set(sizes)):
            raise WireError(f"a chunk must have 8 to {MAX_CHUNK_BYTES} bytes, a multiple of 8")
        storing = isinstance(message, messages.Store)
        form = self.store.forms.number(_lossy(message)) if isinstance(message, messages.Store) else 0
        request = requests[message.request] = PoolRequest(client.session, message.request, storing, client.group, form)
        (self.store.store if storing else self.store.load)(request, message.keys, sizes)

    # -- messages to clients ----------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Pass the chunk store's jobs on to the tier threads, and its answers to clients."""
        assert self._mover is not None
        while self.store.jobs:
            self._mover.submit(self.store.jobs.popleft())
        if self.store.gone:
            self._tell_gone()
        if not self.store.outbox:
            return
        outbox, self.store.outbox = self.store.outbox, {}
        for request, parts in outbox.items():
            self._answer(request.session.route, request, parts)
            self._tidy(request)

    def _tell_gone(self) -> None:
        gone, self.store.gone = self.store.gone or [], []
        for first in range(0, len(gone), messages.MAX_KEYS):
            keys = b"".join(gone[first : first + messages.MAX_KEYS])
            for route, number in list(self._watchers.items()):
                self._send(route, messages.Gone(request=number, keys=keys))

    def _answer(self, route: bytes, request: PoolRequest, parts: list[KeyAnswer] | Grants) -> None:
        if isinstance(parts, Grants):
            if len(parts.frames) <= 4 * ANSWER_FRAME_IDS:
                self._send(route, granted(request.number, parts))
                return
            parts = list(parts.parts())
        first = ids = 0
        for last, part in enumerate(parts, 1):
            ids += len(part.frames) // 4
            if ids >= ANSWER_FRAME_IDS or last == len(parts):
                self._send(route, answer_of(request.number, parts[first:last]))
                first, ids = last, 0

    def _tidy(self, request: PoolRequest) -> None:
        """Forget a request that holds nothing and waits for nothing."""
        if not request.held and not request.waits and request not in self.store.outbox:
            request.session.requests.pop(request.number, None)

    def _send(self, route: bytes, message: Message) -> None:
        try:
            self._open_socket.send_multipart([route, messages.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            # The client is gone or does not read. It keeps what it holds until its lock is free, so it stays in the
            # table, under a random route. Its next message on the old route is refused: it must say Hello again.
            self.counters["unsent"] += 1
            client = self._clients.pop(route, None)
            self._unwatch(route)
            if client is not None:
                self._clients[secrets.token_bytes(16)] = client

    # -- the end of a client ----------------------------------------------------------------------------------------

    def _bury_the_dead(self) -> None:
        for client in [client for client in self._clients.values() if not self._lock.held(client.lock)]:
            self.counters["clients_died"] += 1
            logger.info("client %s of pool %s is gone", client.session.name, self.settings.name)
            self._end(client)

    def _end(self, client: Client) -> None:
        for request in list(client.session.requests.values()):
            self.store.cancel(request)
        client.session.requests.clear()
        self._clients = {route: each for route, each in self._clients.items() if each is not client}
        self._unwatch(client.route)

    def _unwatch(self, route: bytes) -> None:
        self._watchers.pop(route, None)
        if not self._watchers:
            self.store.gone = None

    def status(self) -> dict[str, Any]:
        return {
            "name": self.settings.name,
            "clients": [
                {
                    "name": each.session.name,
                    "held_bytes": each.session.held_bytes,
                    "requests": len(each.session.requests),
                }
                for each in self._clients.values()
            ],
            **_contents(self.store),
            "service": dict(self.counters),
        }


class Pool:
    """A pool embedded in this process; clients in this and other processes find it by ``settings.name``.

    Raises:
        SettingsError: another pool of this name runs here, its memory can't be allocated, a directory can't be used,
            or ``remote`` or ``http`` can't listen.
        LinkUnavailable: no link to other hosts works here.
    """

    def __init__(self, settings: PoolSettings | None = None) -> None:
        self.settings = settings or PoolSettings()
        self._agent: Agent | None = None
        self._reactor = Reactor(self._make, name=f"pdpool-{self.settings.name}")
        self._reactor.start()
        self._api: PoolApi | None = None
        try:
            if self.settings.remote is not None:
                from pdtransport.pool.remote.remote_server import Agent

                self._agent = Agent(self.settings, self._service.share_memory())
            if self.settings.http is not None:
                from pdtransport.pool.admin.http_api import PoolApi

                self._api = PoolApi(self.settings, self.settings.http)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """URL of the HTTP API; empty if there is none."""
        return self._api.url if self._api is not None else ""

    def _make(self, reactor: Reactor) -> PoolService:
        self._service = PoolService(self.settings, reactor)
        return self._service

    def status(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Sizes, clients and counters."""
        return self._reactor.ask(self._service.status, timeout_s)

    def close(self) -> None:
        """End the service. Safe to call twice."""
        api, self._api = self._api, None
        if api is not None:
            api.close()
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()
        self._reactor.stop()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _contents(store: ChunkStore) -> dict[str, Any]:
    """Sizes and counters, for the status page and metrics."""
    frame_bytes, frames = store.settings.frame_bytes, store.budget.frames
    return {
        "chunks": len(store.index),
        "max_chunks": store.index.capacity,
        "index_bytes": store.index.nbytes_committed,
        "memory": {
            "bytes": frames.count * frame_bytes,
            "used_bytes": (frames.count - frames.free) * frame_bytes,
            "hard_pinned_bytes": store.budget.hard_frames * frame_bytes,
            "by_tenant": {group.name: group.used * frame_bytes for group in store.budget.groups if group.used},
        },
        "tiers": {
            tier.name: {
                "up": tier.up,
                "limit_bytes": tier.limit,
                "used_bytes": tier.used,
                "chunks": len(tier),
                "packs": tier.codec is not None,
                "bit": tier.bit,
            }
            for tier in store.lower
        },
        "writeback_bytes": store.writeback_bytes,
        "writeback_limit": store.settings.writeback_bytes,
        "being_filled": store.being_filled,
        "counters": dict(sorted(store.counters.items())),
    }


def _numbers(packed: bytes, kind: str) -> list[int]:
    if len(packed) % int(kind[-1]):
        raise WireError("an array of numbers is truncated")
    return np.frombuffer(packed, dtype=kind).tolist()  # type: ignore[no-any-return]


def _lossy(message: messages.Store) -> Lossy | None:
    return Lossy(message.codec, Grid(*message.grid)) if message.codec and message.grid else None
