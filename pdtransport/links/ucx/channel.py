"""One channel of the ucx link: offers and sends batches to a peer, and asks for and places the peer's batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pdtransport.errors import LinkError
from pdtransport.kernels.runs import Runs, as_runs, merge_runs, stream_bytes
from pdtransport.links.base import Channel, Done, LinkBusy, LinkStats, Prepared
from pdtransport.links.calls import Callbacks
from pdtransport.links.memory import Regions, SlotRing
from pdtransport.links.ucx.binding import CLOSE_S, Bytes, UcxEndpoint, UcxRequest, UcxWorker
from pdtransport.links.ucx.memory import Copy, PageMemory
from pdtransport.links.ucx.wire import (
    WORD_BYTES,
    ControlFrame,
    Opcode,
    packed,
    packed_offer,
    parsed,
    parsed_offer,
    sealed,
    unsealed,
)

MAX_OFFERED = 4096  # batches offered and not released, per channel
MAX_QUEUED = 4096  # batches waiting to be asked for, per channel
INBOX_TAG = 0  # tag of control frames from the peer; batches use tags 1, 2, ...
END_BYTES = 1  # message that ends the receive of a withdrawn batch; shorter than any batch
MAX_ENDPOINTS = 4
# If an endpoint is closed during a message that never completes, its worker can leak (ucxx 0.52, UCX 1.21: in 3 of 96
# trials with a stopped peer, in none of 160 with a dead one). Wait this long for a stopped peer to resume and finish
# the message; a peer that does not keeps its share of slots occupied that long.
PATIENCE_S = 10.0


@dataclass(eq=False)
class _Offered:
    """A batch that the peer may ask for: staged in a slot, or still in its pages (``slot`` is None)."""

    nbytes: int
    data: Bytes | None
    slot: int | None


@dataclass(eq=False)
class _Sent:
    request: UcxRequest
    offered: _Offered | None  # None: a control message, not a batch


@dataclass(eq=False)
class _Wanted:
    """A batch to be placed; ``done`` is None once it is fenced."""

    key: int
    endpoint: UcxEndpoint
    nbytes: int
    runs: Runs
    checksums: bytes
    blocks: int
    done: Done | None
    slot: int = -1
    tag: int = -1
    request: UcxRequest | None = None
    refused: bool = False  # withdrawn by its sender: what completes `request` is not the batch
    move: Copy | None = None  # the copy from the slot into the pages


class _Stopwatch:
    """Adds up the time during which at least one operation is in flight."""

    def __init__(self) -> None:
        self._since: float | None = None

    def set(self, busy: bool) -> float:
        """Set whether anything is in flight; returns the seconds to add to the total."""
        now = time.perf_counter()
        spent = now - self._since if self._since is not None else 0.0
        self._since = now if busy else None
        return spent


class UcxChannel(Channel):
    """Channel of the ucx link; the exchange is described in :mod:`pdtransport.links.ucx.link`."""

    link = "ucx"

    def __init__(
        self,
        worker: UcxWorker,
        memory: PageMemory,
        why: str,
        *,
        regions: Regions,
        callbacks: Callbacks,
        forget: Callable[[UcxWorker], None],
    ) -> None:
        """``forget`` is called before the worker is closed; the others are the link's."""
        self.why = why
        self.stats = LinkStats()
        self.max_batch_bytes = memory.sending.slot_bytes
        self.closed = False
        self.ended = False  # closed, and UCX holds no resources of it any more
        self.worker = worker
        self._memory, self._regions, self._callbacks, self._forget = memory, regions, callbacks, forget
        self._address = sealed(worker.address)
        self._endpoints: dict[bytes, UcxEndpoint] = {}  # by sealed address
        self._next_tag = INBOX_TAG + 1
        self._broken = ""
        self._end_by = 0.0
        self._patient_until = 0.0  # endpoints stay open until then if they are in the middle of a message
        # A peer that never fetches or sends what was agreed must not occupy all slots.
        self._send_share = max(SlotRing.MIN_SLOTS, memory.sending.count // 2)
        self._receive_share = max(SlotRing.MIN_SLOTS, memory.receiving.count // 2)
        self._offered: dict[int, _Offered] = {}
        self._sent: list[_Sent] = []
        self._staged = 0  # slots of the sending ring held by this channel
        self._said: list[UcxRequest] = []
        self._queue: deque[_Wanted] = deque()
        self._posted: list[_Wanted] = []
        self._placing: list[_Wanted] = []
        self._reporting: list[_Wanted] = []  # ended; their callbacks are queued
        self._fences: list[tuple[list[_Wanted], Callable[[], None]]] = []  # (items of `_placing` to wait for, callback)
        self._sending_time, self._receiving_time = _Stopwatch(), _Stopwatch()
        self._inbox = np.zeros(WORD_BYTES, dtype=np.uint8)
        self._heard: UcxRequest | None = worker.receive(self._inbox, INBOX_TAG)

    # -- sender ------------------------------------------------------------------------------------------------------

    def send(self, key: int, runs: Runs, checksum_blocks: int, prepared: Prepared | None = None) -> tuple[bytes, bytes]:
        self._check_open()
        if key in self._offered:
            raise LinkError(f"key {key} is offered already")
        if len(self._offered) >= MAX_OFFERED:
            raise LinkBusy(f"{MAX_OFFERED} batches are offered and not released")
        try:
            runs = merge_runs(as_runs(runs))
            checksums = self._offer(key, runs, checksum_blocks)
        except ValueError as error:
            raise LinkError(str(error)) from None
        nbytes = self._offered[key].nbytes
        self.stats.bytes_sent += nbytes
        self.stats.batches_sent += 1
        return packed_offer(nbytes, self._address), checksums

    def release(self, key: int) -> None:
        offered = self._offered.pop(key, None)
        if offered is not None and not any(sent.offered is offered for sent in self._sent):
            self._let_go(offered)

    def _offer(self, key: int, runs: Runs, blocks: int) -> bytes:
        """Gather a batch into a slot; returns its checksums.

        A single contiguous run with checksums stays in its pages: the checksums would reveal a later change.
        """
        nbytes = stream_bytes(runs)
        if nbytes <= END_BYTES:
            raise LinkError("an empty batch")
        self._regions.check(runs)
        stays = self._memory.in_place(runs, blocks) if len(runs) == 1 and blocks else None
        if stays is not None:
            data, checksums = stays
            self._offered[key] = _Offered(nbytes, data, None)
            return checksums.astype("<u8").tobytes()
        ring = self._memory.sending
        if nbytes > ring.slot_bytes:
            raise LinkError(self._too_long(nbytes))
        if self._staged >= self._send_share or not ring.free:
            raise LinkBusy("all staging slots hold batches that the peer has not asked for yet")
        slot = ring.take()
        try:
            data = ring.view(slot, nbytes)
            checksums = self._memory.gather(runs, slot, nbytes, blocks)
        except (ValueError, LinkError):
            ring.give_back(slot)
            raise
        self._staged += 1
        self._offered[key] = _Offered(nbytes, data, slot)
        return checksums.astype("<u8").tobytes()

    def _too_long(self, nbytes: int) -> str:
        setting = "links.batch_bytes" if self._regions.device < 0 else "links.gpu_slot_bytes"
        return f"a batch of {nbytes} bytes exceeds a staging slot: raise {setting} to {nbytes}"

    def _let_go(self, offered: _Offered) -> None:
        """Release a batch that nothing reads any more."""
        if offered.slot is not None:
            self._memory.sending.give_back(offered.slot)
            self._staged -= 1
            offered.slot = None
        offered.data = None

    def _answer(self, endpoint: UcxEndpoint, ask: ControlFrame) -> None:
        """Send the batch that the peer asked for, or refuse."""
        offered = self._offered.get(ask.key)
        asked_before = offered is not None and any(sent.offered is offered for sent in self._sent)
        if offered is None or offered.data is None or offered.nbytes != ask.nbytes or asked_before:
            refusal = packed(ControlFrame(Opcode.REFUSED, ask.key, ask.tag, 0, self._address))
            self._sent.append(_Sent(endpoint.send(refusal, INBOX_TAG), None))
        else:
            self._sent.append(_Sent(endpoint.send(offered.data, ask.tag), offered))

    def _sends_done(self) -> bool:
        done = [sent for sent in self._sent if sent.request.completed]
        self._sent = [sent for sent in self._sent if not sent.request.completed]
        for sent in done:
            error = sent.request.error()
            if error:
                self._break(error)
            if sent.offered is not None:
                self._let_go(sent.offered)
        return bool(done)

    # -- receiver ----------------------------------------------------------------------------------------------------

    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        self._check_open()
        if len(self._queue) >= MAX_QUEUED:
            raise LinkError(f"{MAX_QUEUED} batches wait to be received")
        try:
            runs = as_runs(runs)
        except ValueError as error:
            raise LinkError(str(error)) from None
        self._regions.check(runs)
        nbytes = stream_bytes(runs)
        offered, address = parsed_offer(offer)
        if offered != nbytes:
            raise LinkError(f"the offer is {offered} bytes long, {nbytes} are expected")
        endpoint = self._reach(address)
        if nbytes > self._memory.receiving.slot_bytes:
            raise LinkError(self._too_long(nbytes))
        if nbytes <= END_BYTES:
            raise LinkError("an empty batch")
        if checksums and (len(checksums) != 8 * blocks or blocks < 1 or nbytes % blocks):
            raise LinkError(f"{len(checksums) // 8} checksums for {blocks} blocks of {nbytes} bytes")
        self._queue.append(_Wanted(key, endpoint, nbytes, runs, checksums, blocks, done))

    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        fenced = set(keys)
        self._queue = deque(wanted for wanted in self._queue if wanted.key not in fenced)
        for wanted in (*self._posted, *self._placing, *self._reporting):
            if wanted.key in fenced:
                wanted.done = None  # its slot waits for the message; its pages are not written any more
        being_written = [wanted for wanted in self._placing if wanted.key in fenced]
        if being_written:
            self._fences.append((being_written, done))
        else:
            done()

    def _ask_some(self) -> bool:
        """Post receives into free slots and ask the peer for the batches."""
        asked = False
        ring = self._memory.receiving
        while self._queue and ring.free and len(self._posted) + len(self._placing) < self._receive_share:
            wanted = self._queue.popleft()
            asked = True
            wanted.slot = ring.take()
            try:
                room = ring.view(wanted.slot, wanted.nbytes)
            except LinkError as error:
                ring.give_back(wanted.slot)
                self._report(wanted, f"link: {error}")
                continue
            wanted.tag, self._next_tag = self._next_tag, self._next_tag + 1
            wanted.request = wanted.endpoint.receive(room, wanted.tag)
            self._say(wanted.endpoint, ControlFrame(Opcode.ASK, wanted.key, wanted.tag, wanted.nbytes, self._address))
            self._posted.append(wanted)
        return asked

    def _receives_done(self) -> bool:
        """Begin to place batches that arrived."""
        done = [wanted for wanted in self._posted if wanted.request is not None and wanted.request.completed]
        self._posted = [wanted for wanted in self._posted if wanted not in done]
        for wanted in done:
            error = self._arrived(wanted)
            if error is None and wanted.done is not None:
                wanted.move = self._memory.place(
                    wanted.slot, wanted.nbytes, wanted.runs, wanted.blocks, wanted.checksums
                )
                self._placing.append(wanted)
                continue
            self._memory.receiving.give_back(wanted.slot)
            if wanted.done is not None:
                self._report(wanted, error)
        return bool(done)

    def _arrived(self, wanted: _Wanted) -> str | None:
        """Why the slot does not hold the batch, or None if it does."""
        assert wanted.request is not None
        error = wanted.request.error()
        if error:
            self._break(error)
            return f"link: {error}"
        return "damaged: withdrawn by its sender before it was sent" if wanted.refused else None

    def _places_done(self) -> bool:
        """Report batches that are in place, and fences that waited for them."""
        done = [wanted for wanted in self._placing if wanted.move is not None and wanted.move.done()]
        self._placing = [wanted for wanted in self._placing if wanted not in done]
        for wanted in done:
            assert wanted.move is not None
            self._memory.receiving.give_back(wanted.slot)
            if wanted.done is not None:
                self._report(wanted, f"link: {self._broken}" if self.closed else wanted.move.error())
        waiting = self._fences if done else []
        for fence in [fence for fence in waiting if not any(wanted in self._placing for wanted in fence[0])]:
            self._fences.remove(fence)
            self._callbacks.add(fence[1])
        return bool(done)

    def _report(self, wanted: _Wanted, error: str | None) -> None:
        """Queue the report of how a batch ended; it is dropped if the batch is fenced before it runs."""
        if error is None:
            self.stats.bytes_received += wanted.nbytes
            self.stats.batches_received += 1
        else:
            self.stats.errors += 1
        self._reporting.append(wanted)
        self._callbacks.add(self._reported, wanted, error)

    def _reported(self, wanted: _Wanted, error: str | None) -> None:
        self._reporting.remove(wanted)
        done, wanted.done = wanted.done, None
        if done is not None:
            done(error)

    # -- both --------------------------------------------------------------------------------------------------------

    def _advance(self) -> bool:
        """Process what the worker moved; True if anything ended or was begun."""
        heard = False
        while self._heard is not None and self._heard.completed and not self._broken and len(self._sent) < MAX_OFFERED:
            heard = self._listen(self._heard)
        if self._broken:
            return self._fail_all()
        sent, received = self._sends_done(), self._receives_done()
        placed = self._places_done()
        asked = self._ask_some()
        self._said = [word for word in self._said if not word.completed]
        self.stats.seconds_sending += self._sending_time.set(bool(self._sent))
        self.stats.seconds_moving += self._receiving_time.set(bool(self._posted or self._placing))
        return heard or sent or received or placed or asked

    def _listen(self, message: UcxRequest) -> bool:
        """Handle one control frame."""
        error = message.error()
        if error:
            self._break(error)
            return True
        word = parsed(self._inbox)
        self._heard = self.worker.receive(self._inbox, INBOX_TAG)
        try:
            if word.say == Opcode.ASK:
                self._answer(self._reach(word.address), word)
            elif word.say == Opcode.END:
                nothing = np.zeros(END_BYTES, dtype=np.uint8)
                self._sent.append(_Sent(self._reach(word.address).send(nothing, word.tag), None))
            elif word.say == Opcode.REFUSED:
                self._refused(word.tag)
        except LinkError:
            self.stats.errors += 1  # there is no peer to answer
        return True

    def _refused(self, tag: int) -> None:
        """Handle a refusal: ask the peer for an END message, because only that ends the receive and frees its slot.

        The batch is marked before END is requested, so that the END message is never taken for the batch, with or
        without checksums.
        """
        for wanted in self._posted:
            if wanted.tag == tag and not wanted.refused:
                wanted.refused = True
                self._say(wanted.endpoint, ControlFrame(Opcode.END, wanted.key, tag, 0, self._address))

    def _say(self, endpoint: UcxEndpoint, word: ControlFrame) -> None:
        self._said.append(endpoint.send(packed(word), INBOX_TAG))

    def _reach(self, address: bytes) -> UcxEndpoint:
        """The endpoint to a channel of the peer; a peer that uses one channel per direction has two."""
        endpoint = self._endpoints.get(address)
        if endpoint is not None:
            return endpoint
        if len(self._endpoints) >= MAX_ENDPOINTS:
            raise LinkError(f"the peer uses more than {MAX_ENDPOINTS} channels")
        try:
            endpoint = self.worker.connect(unsealed(address))
        except Exception as error:  # noqa: BLE001 - each binding has its own exceptions
            raise LinkError(f"the peer's channel can't be reached: {error}") from None
        self._endpoints[address] = endpoint
        return endpoint

    def progress(self) -> bool:
        """Advance messages; True if anything ended or was begun."""
        self.worker.progress()
        if not self.closed:
            return self._advance()
        self._end()
        return False

    def close(self) -> None:
        self._patient_until = 0.0
        self._shut()

    def give_up(self) -> None:
        if not self.closed:
            self._patient_until = time.monotonic() + PATIENCE_S
        self._shut()

    def _shut(self) -> None:
        if not self.closed:
            self._break("the channel is closed")
            self.closed = True
        self._end()

    def _disconnect(self) -> None:
        for endpoint in self._endpoints.values():
            try:
                endpoint.close()
            except Exception:  # noqa: BLE001 - each binding has its own exceptions
                self.stats.errors += 1
        self._endpoints.clear()
        self._end_by = time.monotonic() + CLOSE_S

    def _end(self) -> None:
        """Close the worker once no message holds a slot any more: usually at once, otherwise at a deadline.

        Closing the worker destroys unfinished messages; nothing reads or writes their slots after that. A kernel that
        writes pages can't be cancelled, so it is waited for.
        """
        self._fail_all()
        if self.ended:
            return
        if self._endpoints and not ((self._posted or self._sent) and time.monotonic() < self._patient_until):
            self._disconnect()
            self._fail_all()
        if self._endpoints or self._placing or ((self._posted or self._sent) and time.monotonic() < self._end_by):
            return
        self._forget(self.worker)
        self.worker.close()
        self.ended = True
        posted, sent = self._posted, self._sent
        self._posted, self._sent, self._said, self._heard = [], [], [], None
        for wanted in posted:
            wanted.request = None
            self._memory.receiving.give_back(wanted.slot)
        for message in sent:
            if message.offered is not None:
                self._let_go(message.offered)

    def _break(self, reason: str) -> None:
        if not self._broken:
            self._broken = reason
            self.stats.errors += 1

    def _fail_all(self) -> bool:
        """End all work with an error because the peer is gone. Slots of messages that UCX still holds stay taken."""
        error = f"link: {self._broken}"
        self._places_done()
        held = {id(sent.offered) for sent in self._sent if not sent.request.completed}
        owed = bool(self._offered or self._queue)
        for offered in self._offered.values():
            if id(offered) not in held:
                self._let_go(offered)
        self._offered.clear()
        for sent in self._sent:
            if sent.request.completed and sent.offered is not None:
                self._let_go(sent.offered)
        self._sent = [sent for sent in self._sent if not sent.request.completed]
        for wanted in (*self._posted, *self._queue):
            if wanted.done is not None and wanted not in self._reporting:
                owed = True
                self._report(wanted, error)
        self._queue.clear()
        ended = [wanted for wanted in self._posted if wanted.request is None or wanted.request.completed]
        self._posted = [wanted for wanted in self._posted if wanted not in ended]
        for wanted in ended:
            self._memory.receiving.give_back(wanted.slot)
        return owed

    def _check_open(self) -> None:
        if self._broken:
            raise LinkError(self._broken)
