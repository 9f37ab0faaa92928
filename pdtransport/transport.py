"""The engine-free Python API: hands KV pages from one process to another.

One :class:`Transport` serves one worker (one rank) in either role or both: it *offers* the pages of requests that it
prefills, and *receives* the pages of requests that other workers prefill. All methods may be called from any thread. A
transfer is a :class:`Handle`: wait for it with :meth:`Handle.result`, or await it.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from types import TracebackType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pdtransport.control.channel import ControlChannel, Identity
from pdtransport.errors import InvalidCall, TimedOut, TransferFailed
from pdtransport.io.cuda_events import CudaEventQueue
from pdtransport.io.reactor import Reactor
from pdtransport.kv.geometry import KVGeometry
from pdtransport.kv.groups import GONE, CacheGroups
from pdtransport.links.base import Region
from pdtransport.links.negotiate import open_links
from pdtransport.links.registry import check_links
from pdtransport.observe.status import PatchStatus, TransportStatus
from pdtransport.protocol.messages import PROTOCOL_VERSION, Code, Digest, FingerprintValue, TransferId
from pdtransport.settings import Settings
from pdtransport.transfer.consumer import ReceiveRequest, WantedBlocks
from pdtransport.transfer.engine import TransferEngine, limits_of
from pdtransport.transfer.link_setup import Scratch
from pdtransport.transfer.outcome import OnOutcome, OnPromise, Outcome

_transfer_id: TypeAdapter[str] = TypeAdapter(TransferId)
_digest: TypeAdapter[bytes] = TypeAdapter(Digest)
Pages = Sequence[int] | Sequence[Sequence[int]]  # page ids in order of the blocks; with several cache groups, by group
LET_GO_POLL_S = 0.002  # poll interval while ended transfers still use pages


class Handle:
    """A transfer in flight. ``await handle`` or ``handle.result(timeout)`` returns its :class:`Outcome`.

    A wait that times out or is cancelled does not end the transfer.

    Attributes:
        blocks: by cache group, number of blocks of the whole prompt.
    """

    def __init__(self, transport: Transport, transfer: str, blocks: tuple[int, ...], on_end: OnOutcome | None) -> None:
        self.transfer = transfer
        self.blocks = blocks
        self.future: Future[Outcome] = Future()
        self.future.set_running_or_notify_cancel()  # Future.cancel() must not work: use cancel() of this class
        self._transport = transport
        self._on_end = on_end

    def _in_turn(self, after: Any | None, call: Callable[[TransferEngine], None]) -> None:
        def said(transfer_engine: TransferEngine) -> None:
            transfer_engine.cuda_events.call(self, after, lambda: call(transfer_engine))

        self._transport._call(said)

    def _ended(self, outcome: Outcome) -> None:
        if not self.future.done():
            self.future.set_result(outcome)
        if self._on_end is not None:
            self._on_end(outcome)

    def result(self, timeout_s: float | None) -> Outcome:
        """Wait for the end.

        Raises:
            TransferFailed: the transfer ended without its pages.
            TimedOut: the transfer has not ended within ``timeout_s``.
        """
        try:
            return _checked(self.future.result(timeout_s))
        except FutureTimeout:
            raise TimedOut(f"transfer {self.transfer} has not ended within {timeout_s:g} s") from None

    def __await__(self) -> Generator[Any, None, Outcome]:
        outcome = yield from asyncio.wrap_future(self.future).__await__()
        return _checked(outcome)


class Offer(Handle):
    """Pages of one request that this worker prefills: call :meth:`ready` as they are computed, then :meth:`finish`.

    Every method raises :class:`TransportClosed` once the transport is closed.
    """

    def __init__(
        self,
        transport: Transport,
        transfer: str,
        tokens: int,
        blocks: tuple[int, ...],
        on_end: OnOutcome | None = None,
    ) -> None:
        super().__init__(transport, transfer, blocks, on_end)
        self.tokens = tokens

    def cached(self, tokens: int) -> None:
        """``tokens`` prompt tokens were found in the engine's caches, not computed; decode reports them as usage.

        Call it before the last pages are :meth:`ready`.

        Raises:
            InvalidCall: more tokens than the prompt has.
        """
        self._check_tokens(tokens)
        self._transport._call(lambda transfer_engine: transfer_engine.producer.cached(self, self.transfer, tokens))

    def ready(self, pages: Pages, tokens: int, after: Any | None = None) -> None:
        """The first ``tokens`` prompt tokens are computed.

        A block is final once all its tokens are computed, the last one once the whole prompt is. Fewer tokens than
        before mean that the engine took pages back (preemption).

        Args:
            pages: ``pages[i]`` is the page of block i; with several cache groups, ``pages[group][i]``. -1: a block that
                the engine has given back, because no later token attends to it.
            after: on a GPU, an event (torch's or cupy's) recorded after the kernels that compute the pages. The pages
                are final once the event has passed; later calls on this offer wait for it too.

        Raises:
            InvalidCall: more tokens or pages than the prompt has, or a page that the geometry does not have.
        """
        by_group = self._transport._checked_pages(pages, self.blocks, least=GONE)
        self._check_tokens(tokens)

        def said(transfer_engine: TransferEngine) -> None:
            producer = transfer_engine.producer
            final = partial(producer.pages_ready, self, self.transfer, by_group, tokens)
            event = transfer_engine.cuda_events.call(self, after, final)
            if event:
                producer.prepare(self, self.transfer, by_group, tokens, event)

        self._transport._call(said)

    def _check_tokens(self, tokens: int) -> None:
        if not 0 <= tokens <= self.tokens:
            raise InvalidCall(f"tokens={tokens}: transfer {self.transfer} has a prompt of {self.tokens} tokens")

    def withdraw(self, timeout_s: float) -> None:
        """The engine takes the pages back (preemption). Once this returns, no link reads them.

        Blocks that decode has not received are sent again once they are recomputed.

        Raises:
            TimedOut: the I/O thread did not answer; the pages must not be reused.
        """

        def taken_back(transfer_engine: TransferEngine) -> None:
            transfer_engine.cuda_events.drop(self)
            transfer_engine.producer.pages_ready(self, self.transfer, ([],) * len(self.blocks), 0)

        self._transport._ask(taken_back, timeout_s)

    def finish(self, first_token: int | None = None) -> None:
        """The engine has finished the request. Its pages must stay in place until this transfer ends.

        ``first_token`` is the token that prefill sampled, for a decode that promised to continue from it.
        """
        self._in_turn(None, lambda transfer_engine: transfer_engine.producer.finish(self, self.transfer, first_token))

    def let_go(self, reason: str) -> None:
        """Give up unless decode has granted already; meant for a prompt that decode can also get from the pool."""
        self._in_turn(None, lambda transfer_engine: transfer_engine.producer.let_go(self, self.transfer, reason))

    def cancel(self, reason: str = "cancelled", code: Code = Code.CANCELLED) -> None:
        """Give up; the outcome arrives once nothing reads the pages any more."""

        def cancelled(transfer_engine: TransferEngine) -> None:
            transfer_engine.cuda_events.drop(self)
            transfer_engine.producer.cancel(self, self.transfer, code, reason)

        self._transport._call(cancelled)


class Receipt(Handle):
    """Pages of one request that other workers prefill. The pages must not be used until the transfer has ended."""

    def cancel(self, reason: str = "cancelled", code: Code = Code.CANCELLED) -> None:
        """Give up; the outcome arrives once nothing writes the pages any more."""
        self._in_turn(None, lambda transfer_engine: transfer_engine.consumer.cancel(self, self.transfer, code, reason))


class Transport:
    """Sends and receives KV pages for one worker.

    A context manager, also for ``async with``. Opening it blocks for milliseconds to seconds.

    Args:
        geometry: where this worker's KV is; one geometry for each cache group of the model, if it has several. Its
            memory must stay valid until :meth:`close` (a geometry from :meth:`KVGeometry.of_array` keeps it valid). It
            must not be written while the transport opens: the `shm` link turns it into shared memory in place.
        settings: see :mod:`pdtransport.settings`.
        engine: name of the instance; its workers share it and differ in ``rank`` of ``world``.
        fingerprint: facts besides the geometry that must be equal on both ends (model, dtype, backend, ...).
        regions: memory that links may touch; default: what the geometry spans.
        port: control port of this worker; default ``settings.control.port + rank``, or 7570 + rank
            if that setting is unset. 0: any free port.

    Raises:
        SettingsError: a setting can't be used here (a port in use, a bad key file, a link that is not installed).
        LinkUnavailable: no link of ``settings.links.order`` works here, or the required one does not.
        InvalidCall: an argument is invalid.
    """

    def __init__(
        self,
        geometry: KVGeometry | Sequence[KVGeometry],
        settings: Settings | None = None,
        *,
        engine: str = "",
        rank: int = 0,
        world: int = 1,
        role: str = "both",
        fingerprint: dict[str, FingerprintValue] | None = None,
        regions: Sequence[Region] | None = None,
        port: int | None = None,
    ) -> None:
        self.groups = CacheGroups.of(geometry)
        if not 0 <= rank < world:
            raise InvalidCall(f"rank={rank} is not within 0..world-1 ({world - 1})")
        self.settings = settings or Settings()
        check_links(self.settings)
        self.engine = engine or f"pdt-{uuid.uuid4().hex[:12]}"
        self.rank = rank
        memory = list(regions) if regions is not None else self.groups.regions()

        def make(_reactor: Reactor) -> TransferEngine:
            links, batch_bytes = self.settings.links, limits_of(self.settings, self.groups.device).batch_bytes
            scratch = Scratch(min(links.probe_bytes, batch_bytes), self.groups.device)
            opened = open_links(links, [*memory, *scratch.regions])
            me = Identity(
                engine=self.engine,
                rank=rank,
                world=world,
                incarnation=secrets.randbits(62) | 1,
                fingerprint={**fingerprint_of(self.groups, world), **(fingerprint or {})},
                links={name: link.export() for name, link in opened.links.items()},
            )
            cuda_events = CudaEventQueue(self.groups.device)
            control = ControlChannel(self.settings.control, me)
            self.port = int(control.bind(port).rsplit(":", 1)[1])
            self._engine = TransferEngine(
                self.settings, me, self.groups, control, opened.links, opened.unavailable, role, scratch, cuda_events
            )
            return self._engine

        self._offered: OrderedDict[str, None] = OrderedDict()  # the latest transfer ids
        self._offered_lock = threading.Lock()
        self._reactor = Reactor(make, name=f"pdtransport-{rank}")
        self._reactor.start()
        self.host = self.settings.control.host

    # -- prefill -------------------------------------------------------------------------------------------------

    def offer(
        self,
        transfer: str,
        prompt_digest: bytes,
        tokens: int,
        on_end: OnOutcome | None = None,
        on_promise: OnPromise | None = None,
        adapter: str = "",
    ) -> Offer:
        """Announce a request of ``tokens`` prompt tokens whose pages will be handed over as ``transfer``.

        Args:
            prompt_digest: made of the prompt by :func:`pdtransport.prompt_digest`; decode must pass the same.
            on_end: called in the I/O thread with the outcome. Must not block.
            on_promise: called in the I/O thread, at most once, when decode promises to continue from the first token
                that :meth:`Offer.finish` names. Must not block.
            adapter: display name, for error messages, of the adapter whose content ``prompt_digest`` covers.

        Raises:
            InvalidCall: ``transfer`` was offered here before, or an argument is invalid.
            TransportClosed: this transport is closed.
        """
        blocks = self._checked_prompt(transfer, prompt_digest, tokens)
        self._note_offer(transfer)
        offer = Offer(self, transfer, tokens, blocks, on_end)

        def opened(transfer_engine: TransferEngine) -> None:
            transfer_engine.producer.open(offer, transfer, prompt_digest, tokens, offer._ended, on_promise, adapter)

        self._call(opened)
        return offer

    # -- decode --------------------------------------------------------------------------------------------------

    def receive(
        self,
        transfer: str,
        prompt_digest: bytes,
        tokens: int,
        pages: Pages,
        *,
        host: str,
        port: int,
        ranks: int = 1,
        first_block: int | Sequence[int] = 0,
        first_token: bool = False,
        on_end: OnOutcome | None = None,
        after: Any | None = None,
    ) -> Receipt:
        """Receive blocks ``first_block ..`` of ``transfer`` into ``pages``, up to the prompt's last one.

        With several cache groups, both are by group. A transfer id that was used before ends at once, with the code
        ``reused``.

        Args:
            prompt_digest: as in :meth:`offer`.
            pages: pages to fill, in order of the blocks. Empty if decode already holds everything; prefill then need
                not keep its pages.
            host: host of the prefill workers, which listen at ``port``, ``port + 1``, ...
            ranks: number of the prefill workers.
            first_token: promise to continue from the outcome's first token, if it has one, and from no other.
            on_end: called in the I/O thread with the outcome. Must not block.
            after: on a GPU, an event recorded after the kernels that still use the pages for another request. Nothing
                is written before the event has passed.

        Raises:
            InvalidCall: more pages than the prompt has, a page that the geometry does not have, or another invalid
                argument.
            TransportClosed: this transport is closed.
        """
        blocks = self._checked_prompt(transfer, prompt_digest, tokens)
        firsts = (first_block,) * len(blocks) if isinstance(first_block, int) else tuple(first_block)
        if len(firsts) != len(blocks) or not all(
            0 <= first <= most for first, most in zip(firsts, blocks, strict=True)
        ):
            raise InvalidCall(
                f"first_block={first_block}: a prompt of {tokens} tokens has {'/'.join(map(str, blocks))} blocks"
            )
        by_group = self._checked_pages(pages, [most - first for first, most in zip(firsts, blocks, strict=True)])
        receipt = Receipt(self, transfer, blocks, on_end)
        groups = tuple(map(WantedBlocks, firsts, by_group))
        wanted = ReceiveRequest(transfer, host, port, ranks, prompt_digest, tokens, groups, first_token)
        receipt._in_turn(after, lambda transfer_engine: transfer_engine.consumer.fetch(receipt, wanted, receipt._ended))
        return receipt

    def claim(self, transfer: str, *, host: str, port: int, ranks: int = 1) -> None:
        """Ask prefill to hold ``transfer`` until decode has pages to grant. Best effort; repeat every few seconds."""
        self._call(lambda transfer_engine: transfer_engine.consumer.claim(transfer, host, port, ranks))

    def decline(self, transfer: str, code: Code, reason: str, *, host: str = "", port: int = 0, ranks: int = 1) -> None:
        """``transfer`` will not be received here: notify watchers and, with ``host``, prefill.

        Prefill then need not keep its pages. Best effort; ignored for a transfer that is or was being received.
        """
        self._call(lambda transfer_engine: transfer_engine.consumer.decline(transfer, code, reason, host, port, ranks))

    # -- both ----------------------------------------------------------------------------------------------------

    def status(self, transfer: str = "", timeout_s: float = 5.0) -> TransportStatus:
        """Counters, peers, links with their measured bandwidth, and timelines of recent transfers (or of ``transfer``).

        Raises:
            TimedOut: the I/O thread did not answer.
            TransportClosed: this transport is closed.
        """
        return self._reactor.ask(lambda: self._engine.status(transfer), timeout_s)

    def show_patches(self, patches: Sequence[PatchStatus]) -> None:
        """Show these hooks into the engine's code in the status from now on. Used by engines' adapters."""
        self._engine.patches = list(patches)

    def change_fingerprint(self, facts: dict[str, FingerprintValue], reason: str, timeout_s: float) -> None:
        """Change ``facts`` of the fingerprint, for example after a reload of the model's weights.

        Transfers in flight end as refused, with ``reason``, and every peer must shake hands again under the new facts.
        Once this returns, nothing uses the pages of those transfers. With empty ``facts``, this only ends the
        transfers in flight.

        Raises:
            SettingsError: a fact does not fit into a Hello.
            concurrent.futures.TimeoutError: a link still uses pages, or the I/O thread does not answer.
        """
        until = time.monotonic() + timeout_s
        ending = self._reactor.ask(lambda: self._engine.change_fingerprint(facts, reason), timeout_s)
        while ending:
            if time.monotonic() >= until:
                raise FutureTimeout(f"links still use pages of {len(ending)} transfers that were ended: {reason}")
            time.sleep(LET_GO_POLL_S)
            ending = self._reactor.ask(partial(self._engine.live_of, ending), timeout_s)

    def close(self) -> None:
        """End all transfers and free all resources. Safe to call twice."""
        self._reactor.stop()

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _checked_prompt(self, transfer: str, prompt_digest: bytes, tokens: int) -> tuple[int, ...]:
        """Check a prompt's arguments and return its number of blocks, by cache group.

        Raises:
            InvalidCall: an argument is invalid.
        """
        try:
            _transfer_id.validate_python(transfer, strict=True)
        except ValidationError:
            raise InvalidCall(f"transfer={transfer!r}: 1 to 128 letters, digits, or any of . _ : -") from None
        try:
            _digest.validate_python(prompt_digest, strict=True)
        except ValidationError:
            raise InvalidCall(
                "prompt_digest: expected the bytes that pdtransport.prompt_digest makes of a prompt"
            ) from None
        if tokens < 1:
            raise InvalidCall(f"tokens={tokens}: a prompt has at least one token")
        return self.groups.blocks(tokens)

    def _checked_pages(self, pages: Pages, most: Sequence[int], least: int = 0) -> tuple[list[int], ...]:
        """Check pages and return them by cache group.

        Args:
            most: by group, the number of pages that the prompt has room for.
            least: smallest page id.

        Raises:
            InvalidCall: pages for another number of groups, more pages than there is room for, or one that a geometry
                does not have.
        """
        by_group = _by_group(pages, len(most))
        for geometry, ids, room in zip(self.groups, by_group, most, strict=True):
            if len(ids) > room:
                raise InvalidCall(
                    f"{len(ids)} pages: the prompt has room for {room} ({geometry.block_size} tokens each)"
                )
            if ids and not least <= min(ids) <= max(ids) < geometry.num_blocks:
                raise InvalidCall(f"pages {min(ids)}..{max(ids)}: the geometry has 0..{geometry.num_blocks - 1}")
        return by_group

    def _note_offer(self, transfer: str) -> None:
        """
        Raises:
            InvalidCall: ``transfer`` was offered before.
        """
        with self._offered_lock:
            if transfer in self._offered:
                raise InvalidCall(
                    f"transfer {transfer} was offered before: use a new id for each request and each retry"
                )
            self._offered[transfer] = None
            while len(self._offered) > self.settings.tombstones + self.settings.max_transfers:
                self._offered.popitem(last=False)

    def _ask(self, call: Callable[[TransferEngine], None], timeout_s: float) -> None:
        self._reactor.ask(lambda: call(self._engine), timeout_s)

    def _call(self, call: Callable[[TransferEngine], None]) -> None:
        self._reactor.post(lambda: call(self._engine))


def fingerprint_of(groups: CacheGroups, world: int) -> dict[str, FingerprintValue]:
    """Facts that two workers must agree on (``tp_size`` may differ if the heads can be split).

    With several cache groups, a fact that differs between them is a text with each group's value, ``16/16/32``.
    """
    return {
        "protocol_version": PROTOCOL_VERSION,
        "cache_groups": len(groups),
        "block_size": _of_all([group.block_size for group in groups]),
        "layers": _of_all([len(group.layers) for group in groups]),
        "kv_heads": _of_all([group.total_heads for group in groups]),
        "kv_slot_bytes": _of_all([group.slot_bytes for group in groups]),
        "kv_layout": _of_all(["HNC" if group.heads_first else "NHC" for group in groups]),
        "tp_size": world,
    }


def _of_all(values: Sequence[FingerprintValue]) -> FingerprintValue:
    return values[0] if len(set(values)) == 1 else "/".join(map(str, values))


def _by_group(pages: Pages, groups: int) -> tuple[list[int], ...]:
    """
    Raises:
        InvalidCall: ``pages`` is not for this number of cache groups.
    """
    given: list[Any] = list(pages)
    if not given:
        return ([],) * groups
    if groups == 1 and not isinstance(given[0], Sequence):
        return (given,)
    if len(given) != groups or not all(isinstance(each, Sequence) for each in given):
        raise InvalidCall(f"pages: expected {groups} lists of page ids, one per cache group")
    return tuple(list(each) for each in given)


def _checked(outcome: Outcome) -> Outcome:
    if not outcome.ok:
        raise TransferFailed(f"{outcome.transfer}: {outcome.reason} ({outcome.code})", outcome.code)
    return outcome
