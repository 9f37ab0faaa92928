"""One client on another host, as the pool's agent sees it: what it holds, and what moves to it and from it.

What the service granted for it is given back only when no transfer touches its frames any more.
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
from pdtransport.pool.client.local_wire import FOREVER_S, Asked, ServiceSession, Wire
from pdtransport.pool.core.chunks import parts_of
from pdtransport.pool.core.requests import KeyAnswer, KeyVerdict
from pdtransport.pool.remote.remote_messages import RemoteAnswer, RemotePublish, new_transfer, transfer_key
from pdtransport.protocol.messages import Message, WireError
from pdtransport.transfer.outcome import Outcome
from pdtransport.transport import Offer, Receipt, Transport

logger = logging.getLogger("pdtransport.pool")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ASK_S = 600.0  # the longest deadline that a client's settings allow; it cancels earlier ones itself


@dataclass(eq=False)
class ChunkMove:
    """A transfer of some chunks of a request. ``released``: those that its client does not want any more."""

    places: list[int]
    handle: Offer | Receipt | None = None
    released: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Publication:
    """Chunks of a store that are being fetched; told to the service in the order in which their client told us."""

    places: list[int]
    checksums: bytes
    fetched: bool | None = None  # not known yet


@dataclass(eq=False)
class RemoteRequest:
    """A store or load. ``open``: places that are neither refused, given back nor published."""

    number: int
    store: bool
    sizes: list[int]
    open: set[int]
    session: ServiceSession | None = None
    frames: dict[int, bytes] = field(default_factory=dict)  # granted, to be written
    moves: list[ChunkMove] = field(default_factory=list)
    publications: deque[Publication] = field(default_factory=deque)
    told: deque[list[int]] = field(default_factory=deque)  # Publish messages that are not confirmed
    cancelled: bool = False


@dataclass
class Caller:
    """Whom a client may have us call: itself. ``at``: the address that its connection comes from; ``networks``: where
    else its own may be (``remote.peers``)."""

    at: str
    networks: Sequence[Network]
    complained: bool = False

    def where(self, host: str) -> str:
        """The address to call for ``host``; empty: none."""
        try:
            named = ipaddress.ip_address(host)
        except ValueError:
            return self.at  # a name, which could mean anything
        named = getattr(named, "ipv4_mapped", None) or named
        if named.is_unspecified or str(named) == self.at:
            return self.at
        return host if any(named in network for network in self.networks) else ""


class RemoteClientSession:
    """Runs in the agent's I/O thread.

    Args:
        caller: where the client is.
        batch_frames: the most that one transfer to it brings; a single chunk may be longer.
        send: a message to it.
        post: run a call in the I/O thread.
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
        self._errands: dict[int, RemoteRequest] = {}
        self._left = False

    @property
    def gone(self) -> bool:
        """It left, and nothing moves any more."""
        return self._left and not self._errands

    def leave(self) -> None:
        self._left = True
        for errand in list(self._errands.values()):
            self._cancel(errand)

    # -- what it says -----------------------------------------------------------------------------------------------

    def on_message(self, message: Message, now: float) -> None:
        """
        Raises:
            WireError: it makes no sense.
        """
        if isinstance(message, messages.Store | messages.Load):
            self._begin(message, now)
            return
        number: int = getattr(message, "request", 0)
        errand = self._errands.get(number)
        if isinstance(message, RemotePublish):
            if errand is not None:
                self._fetch(errand, message)
        elif isinstance(message, messages.ReleaseChunks):
            if errand is not None:
                self._release(errand, set(_numbers(message.indices)))
        elif isinstance(message, messages.CancelRequest):
            if errand is not None:
                self._cancel(errand)
        elif isinstance(message, messages.ChunkDamaged):
            if errand is not None and errand.session is not None:
                self.wire.tell(errand.session, message)
        elif number and not isinstance(message, messages.Publish):
            deadline = now + (FOREVER_S if isinstance(message, messages.WatchForgotten) else ASK_S)
            self.wire.ask(Asked(message, number, deadline, lambda _session, answer: self._answered(number, answer)))
        else:
            raise WireError(f"a remote client says no {getattr(message, 'kind', '?')}")

    def _answered(self, number: int, answer: messages.FromPool | PoolUnavailable) -> bool:
        self._send(
            messages.PoolRefused(request=number, what="wish", reason=str(answer)[:500])
            if isinstance(answer, PoolUnavailable)
            else answer
        )
        return not isinstance(answer, messages.Gone)

    def _begin(self, message: messages.Store | messages.Load, now: float) -> None:
        if message.request in self._errands:
            raise WireError(f"request {message.request} is under way already")
        storing = isinstance(message, messages.Store)
        errand = RemoteRequest(message.request, storing, _numbers(message.sizes), set(range(message.count)))
        self._errands[message.request] = errand
        self.wire.ask(Asked(message, message.request, now + ASK_S, partial(self._heard, errand)))

    def _release(self, errand: RemoteRequest, places: set[int]) -> None:
        places &= errand.open
        for move in errand.moves:
            mine = places & set(move.places)
            move.released |= mine
            places -= mine
            if move.handle is not None and move.released >= set(move.places):
                move.handle.cancel("the client does not want it any more")
        self._give_back(errand, places)

    def _give_back(self, errand: RemoteRequest, places: set[int]) -> None:
        if places and errand.session is not None and not errand.cancelled:
            self.wire.tell(
                errand.session, messages.ReleaseChunks(request=errand.number, indices=_words(sorted(places)))
            )
        errand.open -= places
        for place in places:
            errand.frames.pop(place, None)
        self._settle(errand)

    def _cancel(self, errand: RemoteRequest) -> None:
        errand.cancelled = True
        errand.publications.clear()
        for move in errand.moves:
            if move.handle is not None:
                move.handle.cancel("the client cancelled")
        self._settle(errand)

    def _settle(self, errand: RemoteRequest) -> None:
        """Forget what is through."""
        if errand.moves or not (errand.cancelled or not errand.open):
            return
        if self._errands.pop(errand.number, None) is not None:
            self.wire.forget(errand.number, cancel=errand.cancelled)

    # -- what the service says --------------------------------------------------------------------------------------

    def _heard(
        self, errand: RemoteRequest, session: ServiceSession | None, answer: messages.FromPool | PoolUnavailable
    ) -> bool:
        if isinstance(answer, PoolUnavailable):
            if not errand.cancelled:
                self._send(messages.PoolRefused(request=errand.number, what="wish", reason=str(answer)[:500]))
            self._cancel(errand)
            return True
        if errand.cancelled or session is None:
            return False
        errand.session = session
        if isinstance(answer, messages.KeyAnswers):
            try:
                self._grant(errand, list(parts_of(answer, errand.sizes, session.frame_bytes)), session)
            except PoolUnavailable as error:
                self._send(messages.PoolRefused(request=errand.number, what="wish", reason=str(error)[:500]))
                self._cancel(errand)
        elif isinstance(answer, messages.Done):
            if errand.told:
                errand.open -= set(errand.told.popleft())
            self._send(answer)
            self._settle(errand)
        return False

    def _grant(self, errand: RemoteRequest, parts: list[KeyAnswer], session: ServiceSession) -> None:
        plain = [part for part in parts if part.verdict is not KeyVerdict.READ]
        for part in plain:
            if part.verdict is KeyVerdict.WRITE:
                errand.frames[part.place] = part.frames
            else:
                errand.open.discard(part.place)
        if plain:
            self._send(_answer(errand, plain, None))
        for batch in self._batches([part for part in parts if part.verdict is KeyVerdict.READ]):
            self._hand_over(errand, batch, session)
        self._settle(errand)

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

    # -- what moves -------------------------------------------------------------------------------------------------

    def _hand_over(self, errand: RemoteRequest, parts: list[KeyAnswer], session: ServiceSession) -> None:
        """A load: the client fetches these chunks from us."""
        transfer = new_transfer()
        move = ChunkMove([part.place for part in parts])
        frames = b"".join(part.frames for part in parts)
        for part in parts:
            _blank_tail(session, part.frames, errand.sizes[part.place])
        pages = np.frombuffer(frames, dtype="<u4").tolist()
        if not self._enter(errand, move, session):
            return
        offer = self._transport.offer(transfer, transfer_key(transfer), len(pages), self._on_end(errand, move, session))
        move.handle = offer
        offer.ready(pages, len(pages))
        offer.finish()
        self._send(_answer(errand, parts, transfer))

    def _fetch(self, errand: RemoteRequest, message: RemotePublish) -> None:
        """A store: we fetch these chunks from the client."""
        places = _numbers(message.indices)
        session = errand.session
        if session is None or errand.cancelled:
            return
        if not places or len(set(places)) < len(places) or not all(place in errand.frames for place in places):
            raise WireError("chunks that were not granted, or twice")
        host = self._caller.where(message.host)
        if not host:
            self._complain(message.host)
            self._give_back(errand, set(places))
            self._send(messages.Done(request=errand.number, count=0))
            return
        pages = np.frombuffer(b"".join(errand.frames.pop(place) for place in places), dtype="<u4").tolist()
        publication = Publication(places, message.checksums)
        errand.publications.append(publication)
        move = ChunkMove(places)
        if not self._enter(errand, move, session):
            return

        def ended(outcome: Outcome) -> None:
            publication.fetched = outcome.ok

        move.handle = self._transport.receive(
            message.transfer,
            transfer_key(message.transfer),
            len(pages),
            pages,
            host=host,
            port=message.port,
            on_end=self._on_end(errand, move, session, ended),
        )

    def _complain(self, host: str) -> None:
        if not self._caller.complained:
            self._caller.complained = True
            logger.warning(
                "client %s of another host stores nothing: it says that its pages are at %s (its control.host), but "
                "calls from %s; add its network to remote.peers if that is right",
                self.name,
                plain(host, 80),
                self._caller.at,
            )

    def _enter(self, errand: RemoteRequest, move: ChunkMove, session: ServiceSession) -> bool:
        """Keep what the service granted until :meth:`_moved`; False if that is over already."""
        if not session.enter():
            self._cancel(errand)
            return False
        errand.moves.append(move)
        return True

    def _on_end(
        self,
        errand: RemoteRequest,
        move: ChunkMove,
        session: ServiceSession,
        ended: Callable[[Outcome], None] | None = None,
    ) -> Callable[[Outcome], None]:
        def moved(outcome: Outcome) -> None:
            if ended is not None:
                ended(outcome)
            session.leave()
            errand.moves.remove(move)
            self._publish(errand)
            if move.released:
                self._give_back(errand, move.released)
            self._settle(errand)

        def on_end(outcome: Outcome) -> None:
            with contextlib.suppress(RuntimeError):  # the agent closes: it gives everything up itself
                self._post(lambda: moved(outcome))

        return on_end

    def _publish(self, errand: RemoteRequest) -> None:
        while errand.publications and errand.publications[0].fetched is not None:
            done = errand.publications.popleft()
            assert errand.session is not None
            if done.fetched:
                errand.told.append(done.places)
                indices = _words(done.places)
                self.wire.tell(
                    errand.session, messages.Publish(request=errand.number, indices=indices, checksums=done.checksums)
                )
            else:
                self._give_back(errand, set(done.places))
                self._send(messages.Done(request=errand.number, count=0))


def _answer(errand: RemoteRequest, parts: list[KeyAnswer], transfer: str | None) -> RemoteAnswer:
    return RemoteAnswer(
        request=errand.number,
        indices=_words([part.place for part in parts]),
        verdicts=bytes(part.verdict for part in parts),
        checksums=np.array([part.checksum for part in parts], dtype="<u8").tobytes(),
        transfer=transfer,
    )


def _blank_tail(session: ServiceSession, frames: bytes, nbytes: int) -> None:
    """Whole frames cross; what an earlier chunk left behind this one's end is not for this client."""
    assert session.mapping is not None
    used = nbytes % session.frame_bytes
    if used:
        last = int.from_bytes(frames[-4:], "little")
        ctypes.memset(session.mapping.address + last * session.frame_bytes + used, 0, session.frame_bytes - used)


def _numbers(packed: bytes) -> list[int]:
    if len(packed) % 4:
        raise WireError("numbers are cut off")
    return np.frombuffer(packed, dtype="<u4").tolist()  # type: ignore[no-any-return]


def _words(places: list[int]) -> bytes:
    return np.array(places, dtype="<u4").tobytes()
