"""The agent's session with one client on another host: its requests and their transfers.

Invariant: chunks that the service has granted are released only when no transfer touches their frames any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pdtransport.errors import PoolUnavailable
from pdtransport.kv.fingerprint import plain
from pdtransport.pool import messages
from pdtransport.pool.core.chunks import parts_of
from pdtransport.pool.core.requests import KeyAnswer, KeyVerdict
from pdtransport.pool.local_wire import FOREVER_S, Asked, ServiceSession, Wire
from pdtransport.pool.remote.remote_messages import RemoteAnswer, RemotePublish, new_transfer, transfer_digest
from pdtransport.protocol.messages import Message, WireError
from pdtransport.transfer.outcome import Outcome
from pdtransport.transport import Offer, Receipt, Transport

logger = logging.getLogger("pdtransport.pool")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ASK_S = 600.0  # the longest deadline that a client's settings allow; a client with a shorter one cancels by itself


@dataclass(eq=False)
class ChunkMove:
    """A transfer of some chunks of a request. ``released``: places that its client released during the transfer."""

    places: list[int]
    handle: Offer | Receipt | None = None
    released: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Publication:
    """Chunks of one RemotePublish, being fetched. They are published in the order of the client's messages."""

    places: list[int]
    checksums: bytes
    fetched: bool | None = None  # None: the transfer is in flight


@dataclass(eq=False)
class RemoteRequest:
    """A store or load of a remote client. ``open``: places that are not yet refused, released or published."""

    number: int
    store: bool
    sizes: list[int]
    open: set[int]
    session: ServiceSession | None = None
    frames: dict[int, bytes] = field(default_factory=dict)  # by place: frames granted for writing, not yet fetched into
    moves: list[ChunkMove] = field(default_factory=list)
    publications: deque[Publication] = field(default_factory=deque)
    told: deque[list[int]] = field(default_factory=deque)  # places in each unconfirmed Publish message
    cancelled: bool = False


@dataclass
class Caller:
    """The addresses at which the agent may fetch a client's chunks: the client's own, and those of ``remote.peers``.

    Without this check a client could make the agent connect to any host.

    Attributes:
        at: address that the client's connection comes from.
        networks: other networks in which the client's address may be (``remote.peers``).
    """

    at: str
    networks: Sequence[Network]
    complained: bool = False

    def where(self, host: str) -> str:
        """The address to connect to for a client that says it is at ``host``; empty if that is not allowed."""
        try:
            named = ipaddress.ip_address(host)
        except ValueError:
            return self.at  # a host name could resolve to any address
        named = getattr(named, "ipv4_mapped", None) or named
        if named.is_unspecified or str(named) == self.at:
            return self.at
        return host if any(named in network for network in self.networks) else ""


class RemoteClientSession:
    """Proxies one remote client's requests to the service. Runs in the agent's I/O thread.

    Args:
        caller: addresses at which the client's chunks may be fetched.
        batch_frames: maximum frames of one transfer to the client, unless a single chunk has more.
        send: sends a message to the client.
        post: runs a call in the I/O thread.
    """

    def __init__(
        self,
        name: str,
        wire: Wire,
        transport: Transport,
        *,
        caller: Caller,
        batch_frames: int,
        send: Callable[[Message], object],
        post: Callable[[Callable[[], None]], None],
        now: float,
    ) -> None:
        self.name, self.wire, self.heard_at = name, wire, now
        self._transport, self._caller, self._batch_frames = transport, caller, batch_frames
        self._send, self._post = send, post
        self._requests: dict[int, RemoteRequest] = {}
        self._left = False

    @property
    def gone(self) -> bool:
        """Whether the client has left and none of its transfers is in flight."""
        return self._left and not self._requests

    def leave(self) -> None:
        self._left = True
        for request in list(self._requests.values()):
            self._cancel(request)

    # -- messages from the client -----------------------------------------------------------------------------------

    def on_message(self, message: Message, now: float) -> None:
        """Handle a message from the client.

        Raises:
            WireError: the message is invalid here.
        """
        if isinstance(message, messages.Store | messages.Load):
            self._begin(message, now)
            return
        number: int = getattr(message, "request", 0)
        request = self._requests.get(number)
        if isinstance(message, RemotePublish):
            if request is not None:
                self._fetch(request, message)
        elif isinstance(message, messages.ReleaseChunks):
            if request is not None:
                self._release(request, set(_numbers(message.indices)))
        elif isinstance(message, messages.CancelRequest):
            if request is not None:
                self._cancel(request)
        elif isinstance(message, messages.ChunkDamaged):
            if request is not None and request.session is not None:
                self.wire.tell(request.session, message)
        elif number and not isinstance(message, messages.Publish):
            deadline = now + (FOREVER_S if isinstance(message, messages.WatchForgotten) else ASK_S)
            self.wire.ask(Asked(message, number, deadline, lambda _session, answer: self._answered(number, answer)))
        else:
            raise WireError(f"a remote client may not send {getattr(message, 'kind', '?')}")

    def _answered(self, number: int, answer: messages.FromPool | PoolUnavailable) -> bool:
        self._send(
            messages.PoolRefused(request=number, what="wish", reason=str(answer)[:500])
            if isinstance(answer, PoolUnavailable)
            else answer
        )
        return not isinstance(answer, messages.Gone)

    def _begin(self, message: messages.Store | messages.Load, now: float) -> None:
        if message.request in self._requests:
            raise WireError(f"request {message.request} is already in progress")
        storing = isinstance(message, messages.Store)
        request = RemoteRequest(message.request, storing, _numbers(message.sizes), set(range(message.count)))
        self._requests[message.request] = request
        self.wire.ask(Asked(message, message.request, now + ASK_S, partial(self._heard, request)))

    def _release(self, request: RemoteRequest, places: set[int]) -> None:
        places &= request.open
        for move in request.moves:
            mine = places & set(move.places)
            move.released |= mine
            places -= mine
            if move.handle is not None and move.released >= set(move.places):
                move.handle.cancel("the client no longer needs it")
        self._give_back(request, places)

    def _give_back(self, request: RemoteRequest, places: set[int]) -> None:
        if places and request.session is not None and not request.cancelled:
            self.wire.tell(
                request.session, messages.ReleaseChunks(request=request.number, indices=_words(sorted(places)))
            )
        request.open -= places
        for place in places:
            request.frames.pop(place, None)
        self._settle(request)

    def _cancel(self, request: RemoteRequest) -> None:
        request.cancelled = True
        request.publications.clear()
        for move in request.moves:
            if move.handle is not None:
                move.handle.cancel("the client cancelled")
        self._settle(request)

    def _settle(self, request: RemoteRequest) -> None:
        """End a request that has no transfer in flight, and is cancelled or has no open chunk."""
        if request.moves or not (request.cancelled or not request.open):
            return
        if self._requests.pop(request.number, None) is not None:
            self.wire.forget(request.number, cancel=request.cancelled)

    # -- answers from the service -----------------------------------------------------------------------------------

    def _heard(
        self, request: RemoteRequest, session: ServiceSession | None, answer: messages.FromPool | PoolUnavailable
    ) -> bool:
        if isinstance(answer, PoolUnavailable):
            if not request.cancelled:
                self._send(messages.PoolRefused(request=request.number, what="wish", reason=str(answer)[:500]))
            self._cancel(request)
            return True
        if request.cancelled or session is None:
            return False
        request.session = session
        if isinstance(answer, messages.KeyAnswers):
            try:
                self._grant(request, list(parts_of(answer, request.sizes, session.frame_bytes)), session)
            except PoolUnavailable as error:
                self._send(messages.PoolRefused(request=request.number, what="wish", reason=str(error)[:500]))
                self._cancel(request)
        elif isinstance(answer, messages.Done):
            if request.told:
                request.open -= set(request.told.popleft())
            self._send(answer)
            self._settle(request)
        return False

    def _grant(self, request: RemoteRequest, parts: list[KeyAnswer], session: ServiceSession) -> None:
        plain = [part for part in parts if part.verdict is not KeyVerdict.READ]
        for part in plain:
            if part.verdict is KeyVerdict.WRITE:
                request.frames[part.place] = part.frames
            else:
                request.open.discard(part.place)
        if plain:
            self._send(_answer(request, plain, None))
        for batch in self._batches([part for part in parts if part.verdict is KeyVerdict.READ]):
            self._hand_over(request, batch, session)
        self._settle(request)

    def _batches(self, parts: list[KeyAnswer]) -> Iterator[list[KeyAnswer]]:
        batch: list[KeyAnswer] = []
        frames = 0
        for part in parts:
            count = len(part.frames) // 4
            if batch and frames + count > self._batch_frames:
                yield batch
                batch, frames = [], 0
            batch.append(part)
            frames += count
        if batch:
            yield batch

    # -- transfers --------------------------------------------------------------------------------------------------

    def _hand_over(self, request: RemoteRequest, parts: list[KeyAnswer], session: ServiceSession) -> None:
        """Load: offer these chunks in a transfer that the client fetches."""
        transfer = new_transfer()
        move = ChunkMove([part.place for part in parts])
        frames = b"".join(part.frames for part in parts)
        for part in parts:
            _blank_tail(session, part.frames, request.sizes[part.place])
        pages = np.frombuffer(frames, dtype="<u4").tolist()
        if not self._enter(request, move, session):
            return
        offer = self._transport.offer(
            transfer, transfer_digest(transfer), len(pages), self._on_end(request, move, session)
        )
        move.handle = offer
        offer.ready(pages, len(pages))
        offer.finish()
        self._send(_answer(request, parts, transfer))

    def _fetch(self, request: RemoteRequest, message: RemotePublish) -> None:
        """Store: fetch these chunks from the client.

        Raises:
            WireError: a chunk was not granted for writing, or occurs twice.
        """
        places = _numbers(message.indices)
        session = request.session
        if session is None or request.cancelled:
            return
        if not places or len(set(places)) < len(places) or not all(place in request.frames for place in places):
            raise WireError("chunks that were not granted, or twice")
        host = self._caller.where(message.host)
        if not host:
            self._complain(message.host)
            self._give_back(request, set(places))
            self._send(messages.Done(request=request.number, count=0))
            return
        pages = np.frombuffer(b"".join(request.frames.pop(place) for place in places), dtype="<u4").tolist()
        publication = Publication(places, message.checksums)
        request.publications.append(publication)
        move = ChunkMove(places)
        if not self._enter(request, move, session):
            return

        def ended(outcome: Outcome) -> None:
            publication.fetched = outcome.ok

        move.handle = self._transport.receive(
            message.transfer,
            transfer_digest(message.transfer),
            len(pages),
            pages,
            host=host,
            port=message.port,
            on_end=self._on_end(request, move, session, ended),
        )

    def _complain(self, host: str) -> None:
        if not self._caller.complained:
            self._caller.complained = True
            logger.warning(
                "client %s on another host can't store: its control.host is %s, but it connects from %s; add its "
                "network to remote.peers if that is intended",
                self.name,
                plain(host, 80),
                self._caller.at,
            )

    def _enter(self, request: RemoteRequest, move: ChunkMove, session: ServiceSession) -> bool:
        """Keep the session's mapping and lock until the transfer ends.

        Returns:
            False if the session has ended. Then the request is cancelled.
        """
        if not session.enter():
            self._cancel(request)
            return False
        request.moves.append(move)
        return True

    def _on_end(
        self,
        request: RemoteRequest,
        move: ChunkMove,
        session: ServiceSession,
        ended: Callable[[Outcome], None] | None = None,
    ) -> Callable[[Outcome], None]:
        def moved(outcome: Outcome) -> None:
            if ended is not None:
                ended(outcome)
            session.leave()
            request.moves.remove(move)
            self._publish(request)
            if move.released:
                self._give_back(request, move.released)
            self._settle(request)

        def on_end(outcome: Outcome) -> None:
            with contextlib.suppress(RuntimeError):  # the agent is closing, which releases everything
                self._post(lambda: moved(outcome))

        return on_end

    def _publish(self, request: RemoteRequest) -> None:
        while request.publications and request.publications[0].fetched is not None:
            done = request.publications.popleft()
            assert request.session is not None
            if done.fetched:
                request.told.append(done.places)
                indices = _words(done.places)
                self.wire.tell(
                    request.session, messages.Publish(request=request.number, indices=indices, checksums=done.checksums)
                )
            else:
                self._give_back(request, set(done.places))
                self._send(messages.Done(request=request.number, count=0))


def _answer(request: RemoteRequest, parts: list[KeyAnswer], transfer: str | None) -> RemoteAnswer:
    return RemoteAnswer(
        request=request.number,
        indices=_words([part.place for part in parts]),
        verdicts=bytes(part.verdict for part in parts),
        checksums=np.array([part.checksum for part in parts], dtype="<u8").tobytes(),
        transfer=transfer,
    )


def _blank_tail(session: ServiceSession, frames: bytes, nbytes: int) -> None:
    """Zero the last frame of a chunk behind its end.

    Transfers move whole frames, and bytes of an earlier chunk in that frame must not reach this client.
    """
    assert session.mapping is not None
    used = nbytes % session.frame_bytes
    if used:
        last = int.from_bytes(frames[-4:], "little")
        ctypes.memset(session.mapping.address + last * session.frame_bytes + used, 0, session.frame_bytes - used)


def _numbers(packed: bytes) -> list[int]:
    if len(packed) % 4:
        raise WireError("an array of numbers is truncated")
    return np.frombuffer(packed, dtype="<u4").tolist()  # type: ignore[no-any-return]


def _words(places: list[int]) -> bytes:
    return np.array(places, dtype="<u4").tobytes()
