"""One channel of the ucx link: what we offer and send to a peer, and what we ask of it and place."""

from __future__ import annotations

import hashlib
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack
import numpy as np

from pdtransport.errors import LinkError
from pdtransport.kernels import pages
from pdtransport.kernels.reference import memory
from pdtransport.kernels.runs import Runs, as_runs, merge_runs, stream_bytes
from pdtransport.links._ucx_binding import CLOSE_S, Bytes, Endpoint, Request, Worker
from pdtransport.links.base import Channel, Done, LinkBusy, LinkStats
from pdtransport.links.calls import call
from pdtransport.links.memory import SlotRing

if TYPE_CHECKING:
    from pdtransport.links.ucx import UcxLink

MAX_OFFERED = 4096  # batches offered and not released, a channel
MAX_QUEUED = 4096  # batches to ask for, a channel
MAX_ADDRESS_BYTES = 1000  # a worker has 80 (tcp) to 300 bytes
ASK = struct.Struct(f"<QQQH{MAX_ADDRESS_BYTES + 16}s")  # key, tag to send it to, bytes, length of sealed address, it
INBOX_TAG = 0  # where a channel hears what its peer asks for; batches come to 1, 2, ...
REFUSAL_BYTES = 1  # an answer this short, shorter than any batch, says that the batch was taken back
CANARY_BYTES = 16
MAX_ENDPOINTS = 4


@dataclass(eq=False)
class _Offered:
    """A batch that the peer may ask for: in a slot, or (``slot`` is None) still in its pages."""

    nbytes: int
    data: Bytes | None
    slot: int | None
    done: Done | None  # None once called


@dataclass(eq=False)
class _Sent:
    request: Request
    offered: _Offered | None  # None: a refusal


@dataclass(eq=False)
class _Wanted:
    """A batch to be placed; ``done`` is None once it is fenced."""

    key: int
    endpoint: Endpoint
    nbytes: int
    runs: Runs
    checksums: bytes
    blocks: int
    done: Done | None
    slot: int = -1
    request: Request | None = None
    canary: bytes = b""


class _Stopwatch:
    """Adds up the time during which anything is under way."""

    def __init__(self) -> None:
        self._since: float | None = None

    def set(self, busy: bool) -> float:
        """Seconds to add now."""
        now = time.perf_counter()
        spent = now - self._since if self._since is not None else 0.0
        self._since = now if busy else None
        return spent


class UcxChannel(Channel):
    """See :mod:`pdtransport.links.ucx`."""

    link = "ucx"
    one_sided = False

    def __init__(self, link: UcxLink, worker: Worker, why: str) -> None:
        self.why = why
        self.stats = LinkStats()
        self.closed = False
        self.ended = False  # closed, and UCX holds nothing of it any more
        self.worker = worker
        self._link = link
        self._address = sealed(worker.address)
        self._endpoints: dict[bytes, Endpoint] = {}  # by sealed address
        self._next_tag = INBOX_TAG + 1
        self._broken = ""
        self._end_by = 0.0
        # A peer that does not take or send what was agreed on must not hold all slots.
        self._send_share = max(SlotRing.MIN_SLOTS, link.sending.count // 2)
        self._receive_share = max(SlotRing.MIN_SLOTS, link.receiving.count // 2)
        self._offered: dict[int, _Offered] = {}
        self._sent: list[_Sent] = []
        self._staged = 0  # slots of the sending ring that this channel holds
        self._asks: list[Request] = []
        self._queue: deque[_Wanted] = deque()
        self._posted: list[_Wanted] = []
        self._reporting: list[_Wanted] = []  # ended; their callbacks are due
        self._sending_time, self._receiving_time = _Stopwatch(), _Stopwatch()
        self._inbox = np.zeros(ASK.size, dtype=np.uint8)
        self._heard: Request | None = worker.receive(self._inbox, INBOX_TAG)

    # -- sender ------------------------------------------------------------------------------------------------------

    def send(self, key: int, runs: Runs, checksum_blocks: int, done: Done) -> tuple[bytes, bytes]:
        self._check_open()
        if key in self._offered:
            raise LinkError(f"key {key} is offered already")
        if len(self._offered) >= MAX_OFFERED:
            raise LinkBusy(f"{MAX_OFFERED} batches are offered and not released")
        try:
            runs = merge_runs(as_runs(runs))
            checksums = self._offer(key, runs, checksum_blocks, done)
        except ValueError as error:
            raise LinkError(str(error)) from None
        nbytes = self._offered[key].nbytes
        self.stats.bytes_sent += nbytes
        self.stats.batches_sent += 1
        return msgpack.packb((nbytes, self._address)), checksums

    def release(self, key: int) -> None:
        offered = self._offered.pop(key, None)
        if offered is not None and not any(sent.offered is offered for sent in self._sent):
            self._let_go(offered, None)

    def _offer(self, key: int, runs: Runs, blocks: int, done: Done) -> bytes:
        """Gather into a slot; one contiguous run stays in its pages if its checksum will tell should they change."""
        nbytes = stream_bytes(runs)
        if nbytes <= REFUSAL_BYTES:
            raise LinkError("an empty batch")
        if len(runs) == 1 and blocks:
            self._link.regions.check(runs)
            checksums = pages.checksum(runs, blocks)
            self._offered[key] = _Offered(nbytes, memory(int(runs[0, 0]), nbytes), None, done)
            return checksums.astype("<u8").tobytes()
        ring = self._link.sending
        if nbytes > ring.slot_bytes:
            raise LinkError(f"a batch of {nbytes} bytes exceeds a staging slot: raise links.batch_bytes to {nbytes}")
        if self._staged >= self._send_share or not ring.free:
            raise LinkBusy("all staging slots hold batches that the peer has not asked for yet")
        self._link.regions.check(runs)
        slot = ring.take()
        data = ring.view(slot, nbytes)
        try:
            checksums = pages.gather(runs, data.ctypes.data, blocks)
        except ValueError:
            ring.give_back(slot)
            raise
        self._staged += 1
        self._offered[key] = _Offered(nbytes, data, slot, None)
        self._link.callbacks.add(done, None)  # the pages were read already
        return checksums.astype("<u8").tobytes()

    def _let_go(self, offered: _Offered, error: str | None) -> None:
        """Nothing reads this batch any more."""
        if offered.slot is not None:
            self._link.sending.give_back(offered.slot)
            self._staged -= 1
            offered.slot = None
        offered.data = None
        if offered.done is not None:
            self._link.callbacks.add(offered.done, error)
            offered.done = None

    def _answer(self, endpoint: Endpoint, key: int, tag: int, nbytes: int) -> None:
        """Send what the peer asked for, or a refusal: its receive must end either way."""
        offered = self._offered.get(key)
        asked_before = offered is not None and any(sent.offered is offered for sent in self._sent)
        if offered is None or offered.data is None or offered.nbytes != nbytes or asked_before:
            self._sent.append(_Sent(endpoint.send(np.zeros(REFUSAL_BYTES, dtype=np.uint8), tag), None))
        else:
            self._sent.append(_Sent(endpoint.send(offered.data, tag), offered))

    def _sends_done(self) -> bool:
        done = [sent for sent in self._sent if sent.request.completed]
        self._sent = [sent for sent in self._sent if not sent.request.completed]
        for sent in done:
            error = sent.request.error()
            if error:
                self._break(error)
            if sent.offered is not None:
                self._let_go(sent.offered, f"link: {error}" if error else None)
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
        self._link.regions.check(runs)
        nbytes = stream_bytes(runs)
        offered, address = _parse_offer(offer)
        if offered != nbytes:
            raise LinkError(f"the offer is {offered} bytes long, {nbytes} are expected")
        endpoint = self._reach(address)
        if nbytes > self._link.receiving.slot_bytes:
            raise LinkError(f"a batch of {nbytes} bytes exceeds a staging slot: raise links.batch_bytes to {nbytes}")
        if nbytes <= REFUSAL_BYTES:
            raise LinkError("an empty batch")
        if checksums and (len(checksums) != 8 * blocks or blocks < 1 or nbytes % blocks):
            raise LinkError(f"{len(checksums) // 8} checksums for {blocks} blocks of {nbytes} bytes")
        self._queue.append(_Wanted(key, endpoint, nbytes, runs, checksums, blocks, done))

    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        fenced = set(keys)
        self._queue = deque(wanted for wanted in self._queue if wanted.key not in fenced)
        for wanted in (*self._posted, *self._reporting):
            if wanted.key in fenced:
                wanted.done = None  # its slot waits for the message; its pages are not written any more
        done()

    def _ask_some(self) -> bool:
        """Post receives into free slots and ask the peer for them."""
        asked = False
        ring = self._link.receiving
        while self._queue and ring.free and len(self._posted) < self._receive_share:
            wanted = self._queue.popleft()
            wanted.slot = ring.take()
            room = ring.view(wanted.slot, wanted.nbytes)
            # A message shorter than it should be leaves these bytes as they are.
            wanted.canary = secrets.token_bytes(min(CANARY_BYTES, wanted.nbytes - REFUSAL_BYTES))
            room[room.size - len(wanted.canary) :] = np.frombuffer(wanted.canary, dtype=np.uint8)
            tag, self._next_tag = self._next_tag, self._next_tag + 1
            wanted.request = wanted.endpoint.receive(room, tag)
            ask = ASK.pack(wanted.key, tag, wanted.nbytes, len(self._address), self._address)
            self._asks.append(wanted.endpoint.send(np.frombuffer(ask, dtype=np.uint8), INBOX_TAG))
            self._posted.append(wanted)
            asked = True
        return asked

    def _receives_done(self) -> bool:
        done = [wanted for wanted in self._posted if wanted.request is not None and wanted.request.completed]
        if not done:
            return False
        self._posted = [wanted for wanted in self._posted if wanted not in done]
        for wanted in done:
            error = self._place(wanted) if wanted.done is not None else None
            self._link.receiving.give_back(wanted.slot)
            if wanted.done is not None:
                self._report(wanted, error)
        return True

    def _place(self, wanted: _Wanted) -> str | None:
        """Verify the slot, then scatter it into the pages: damaged bytes never reach them."""
        assert wanted.request is not None
        error = wanted.request.error()
        if error:
            self._break(error)
            return f"link: {error}"
        room = self._link.receiving.view(wanted.slot, wanted.nbytes)
        if room[room.size - len(wanted.canary) :].tobytes() == wanted.canary:
            return "damaged: withdrawn by its sender before it was sent, or cut short"
        source = np.array([[room.ctypes.data, wanted.nbytes]], dtype=np.uint64)
        try:
            if wanted.checksums:
                expected = np.frombuffer(wanted.checksums, dtype="<u8")
                wrong = np.flatnonzero(pages.checksum(source, wanted.blocks) != expected)
                if len(wrong):
                    return (
                        f"damaged: {len(wrong)} of {wanted.blocks} blocks differ from their checksums, first {wrong[0]}"
                    )
            pages.copy_runs(source, wanted.runs)
        except ValueError as problem:
            return f"link: {problem}"
        return None

    def _report(self, wanted: _Wanted, error: str | None) -> None:
        """Say how it ended, soon, unless it is fenced before that."""
        if error is None:
            self.stats.bytes_received += wanted.nbytes
            self.stats.batches_received += 1
        else:
            self.stats.errors += 1
        self._reporting.append(wanted)
        self._link.callbacks.add(self._reported, wanted, error)

    def _reported(self, wanted: _Wanted, error: str | None) -> None:
        self._reporting.remove(wanted)
        done, wanted.done = wanted.done, None
        if done is not None:
            done(error)

    # -- both --------------------------------------------------------------------------------------------------------

    def _advance(self) -> bool:
        """Look at what the worker moved; True if anything ended or was begun."""
        heard = False
        while self._heard is not None and self._heard.completed and not self._broken and len(self._sent) < MAX_OFFERED:
            heard = self._listen(self._heard)
        if self._broken:
            return self._fail_all()
        sent, received = self._sends_done(), self._receives_done()
        asked = self._ask_some()
        self._asks = [ask for ask in self._asks if not ask.completed]
        self.stats.seconds_sending += self._sending_time.set(bool(self._sent))
        self.stats.seconds_moving += self._receiving_time.set(bool(self._posted))
        return heard or sent or received or asked

    def _listen(self, message: Request) -> bool:
        """Answer one ask."""
        error = message.error()
        if error:
            self._break(error)
            return True
        key, tag, nbytes, length, address = ASK.unpack(self._inbox.tobytes())
        self._heard = self.worker.receive(self._inbox, INBOX_TAG)
        try:
            self._answer(self._reach(address[:length]), key, tag, nbytes)
        except LinkError:
            self.stats.errors += 1  # nobody to answer to
        return True

    def _reach(self, address: bytes) -> Endpoint:
        """The endpoint to a channel of the peer: one, or two where it uses a channel for each direction."""
        endpoint = self._endpoints.get(address)
        if endpoint is not None:
            return endpoint
        if len(self._endpoints) >= MAX_ENDPOINTS:
            raise LinkError(f"the peer names more than {MAX_ENDPOINTS} channels of its own")
        try:
            endpoint = self.worker.connect(unsealed(address))
        except Exception as error:  # noqa: BLE001 - each binding has its own exceptions
            raise LinkError(f"the peer's channel can't be reached: {error}") from None
        self._endpoints[address] = endpoint
        return endpoint

    def progress(self) -> bool:
        """Move messages on; True if anything ended or was begun."""
        self.worker.progress()
        if not self.closed:
            return self._advance()
        self._end()
        return False

    def close(self) -> None:
        if self.closed:
            return
        self._break("the channel is closed")
        self.closed = True
        for endpoint in self._endpoints.values():
            try:
                endpoint.close()
            except Exception:  # noqa: BLE001 - each binding has its own exceptions
                self.stats.errors += 1
        self._endpoints.clear()
        self._end_by = time.monotonic() + CLOSE_S
        self._end()

    def _end(self) -> None:
        """Let go of the worker once no message holds a slot any more: at once, as a rule, else at a deadline. With its
        worker, a message that did not end is destroyed; nothing reads or writes its slot after that."""
        self._fail_all()
        if self.ended or ((self._posted or self._sent) and time.monotonic() < self._end_by):
            return
        self._link.forget(self.worker)
        self.worker.close()
        self.ended = True
        posted, sent = self._posted, self._sent
        self._posted, self._sent, self._asks, self._heard = [], [], [], None
        for wanted in posted:
            wanted.request = None
            self._link.receiving.give_back(wanted.slot)
        for message in sent:
            if message.offered is not None:
                self._let_go(message.offered, f"link: {self._broken}")

    def _break(self, reason: str) -> None:
        if not self._broken:
            self._broken = reason
            self.stats.errors += 1

    def _fail_all(self) -> bool:
        """The peer is gone: end all work with an error. Slots of messages that UCX still holds stay with them."""
        error = f"link: {self._broken}"
        held = {id(sent.offered) for sent in self._sent if not sent.request.completed}
        owed = bool(self._offered or self._queue)
        for offered in self._offered.values():
            if id(offered) not in held:
                self._let_go(offered, error)
            elif offered.done is not None:
                call(offered.done, error)
                offered.done = None
        self._offered.clear()
        for sent in self._sent:
            if sent.request.completed and sent.offered is not None:
                self._let_go(sent.offered, error)
        self._sent = [sent for sent in self._sent if not sent.request.completed]
        for wanted in (*self._posted, *self._queue):
            if wanted.done is not None and wanted not in self._reporting:
                owed = True
                self._report(wanted, error)
        self._queue.clear()
        ended = [wanted for wanted in self._posted if wanted.request is None or wanted.request.completed]
        self._posted = [wanted for wanted in self._posted if wanted not in ended]
        for wanted in ended:
            self._link.receiving.give_back(wanted.slot)
        return owed

    def _check_open(self) -> None:
        if self._broken:
            raise LinkError(self._broken)


def _parse_offer(offer: bytes) -> tuple[int, bytes]:
    """The batch's length and the sealed address of the channel that offers it."""
    try:
        nbytes, address = msgpack.unpackb(offer, raw=False)
        if not isinstance(nbytes, int) or not isinstance(address, bytes):
            raise ValueError("a number and an address are expected")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise LinkError(f"not an offer of the ucx link: {error}") from None
    return nbytes, address


def sealed(address: bytes) -> bytes:
    """A worker address behind its digest: UCX trusts addresses blindly, a damaged one would crash the process."""
    if len(address) > MAX_ADDRESS_BYTES:
        raise LinkError(f"UCX' address of {len(address)} bytes is too long: name fewer devices in UCX_NET_DEVICES")
    return hashlib.blake2b(address, digest_size=16, person=b"pdt-ucx-address").digest() + address


def unsealed(sealed_address: bytes) -> bytes:
    """The worker address.

    Raises:
        ValueError: it was damaged.
    """
    address = sealed_address[16:]
    if not 0 < len(address) <= MAX_ADDRESS_BYTES or sealed(address) != sealed_address:
        raise ValueError("not a UCX address")
    return address
