"""The one interface behind which bytes move.

A link moves *runs* (address, length) of a sender's memory into runs of a receiver's memory. Fragmentation may
differ on the two sides; both lists describe the same byte stream in the same order.

All methods are called from the transport's I/O thread; none may block longer than moving one batch takes. A link
with work under way makes progress in :meth:`Link.progress`; :meth:`Link.fileno` wakes the I/O thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdtransport.kv.geometry import Region as Region  # links register these
from pdtransport.links.memory import Regions
from pdtransport.settings import LinkSettings

# shape (n, 2), dtype uint64: [address, nbytes] of each run, in stream order
Runs = npt.NDArray[np.uint64]

# One call when an operation ended: ``error`` is None, or one line saying why it failed.
Done = Callable[["str | None"], None]


@dataclass
class LinkStats:
    """Counters of one channel since it was opened. Seconds count the time during which at least one batch was on its
    way (not while it queued)."""

    bytes_sent: int = 0
    bytes_received: int = 0
    batches_sent: int = 0
    batches_received: int = 0
    seconds_moving: float = 0.0  # of batches that we receive
    seconds_sending: float = 0.0  # of batches that we send; stays 0 on links whose receiver reads by itself
    errors: int = 0

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of the direction that this side measured (receiving, where it did both), or None."""
        if self.bytes_received and self.seconds_moving > 0:
            return self.bytes_received / self.seconds_moving
        if self.bytes_sent and self.seconds_sending > 0:
            return self.bytes_sent / self.seconds_sending
        return None


@dataclass(frozen=True)
class Prepared:
    """What :meth:`Channel.prepare` made; ``offer`` is what :meth:`Channel.send` will offer."""

    offer: bytes


class Channel(ABC):
    """One link to one peer incarnation."""

    link: str
    why: str  # one line: why this link carries the pair, and why better ones did not
    one_sided: bool = False  # True: the sender writes the receiver's pages itself
    in_place: bool = False  # the receiver reads pages where they lie, at memory's speed: a batch takes milliseconds
    max_batch_bytes: int = 1 << 40  # the largest batch that `send` takes
    stats: LinkStats

    def prepare(self, runs: Runs, checksum_blocks: int, event_handle: int) -> Prepared | None:
        """GPU memory: do what can be done of a :meth:`send` before the kernels have ended that compute the pages,
        behind which the raw cudaEvent_t is recorded. The result is for that one ``send``, after the event; it may be
        dropped. None: there is nothing to gain."""
        return None

    @abstractmethod
    def send(
        self, key: int, runs: Runs, checksum_blocks: int, done: Done, prepared: Prepared | None = None
    ) -> tuple[bytes, bytes]:
        """Offer ``runs`` under ``key`` (unique per channel, < 2**56).

        The stream holds ``checksum_blocks`` equally long blocks (0: no checksums wanted). Returns
        ``(offer, checksums)``: the offer travels to the receiver's :meth:`receive`, checksums are little-endian u64,
        one a block. ``done`` is called once the link no longer reads the runs; links that read them when the
        receiver asks call it on :meth:`release`.

        Raises:
            LinkBusy: no staging slot is free; try again after :meth:`Link.progress`.
            LinkError: the channel is broken.
        """

    @abstractmethod
    def release(self, key: int) -> None:
        """The receiver has the batch, or will never want it: forget ``key``. Unknown keys are ignored."""

    def attach(self) -> None:  # noqa: B027 - most links need nothing
        """We are about to receive: get hold of what that needs of the peer. Senders don't call it, so that they pin
        nothing of their receivers.

        Raises:
            LinkUnavailable: we can't; the text says why.
        """

    def prepare_read(self, offer: bytes, runs: Runs, blocks: int) -> None:  # noqa: B027 - most links have nothing to gain
        """A batch with this ``offer`` will come for ``runs`` (``blocks`` 0: without checksums): do what can be done of
        its :meth:`receive` now, and touch neither side's pages. Never raises; the batch may never come, or be another.
        """

    @abstractmethod
    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        """Place the batch ``key`` into ``runs``, ``blocks`` equally long blocks, and verify ``checksums``
        (empty: don't). ``done(None)`` after every byte is in place and verified; ``done("damaged: ...")`` on a
        checksum mismatch. Bytes are written by this process only, and none after ``done`` or :meth:`fence`.
        """

    @abstractmethod
    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        """Receiver: stop placing ``keys``; ``done()`` once nothing of theirs can be written any more. Their
        ``receive`` callbacks are not called after that."""

    @abstractmethod
    def close(self) -> None:
        """The peer's incarnation ended: drop all work; callbacks still owed get an error, now or in the next
        :meth:`Link.progress`. Never blocks for long, never raises."""

    def give_up(self) -> None:
        """As :meth:`close`, but the peer may only stand still: messages that have begun may end before what carries
        them goes."""
        self.close()


class Link(ABC):
    """One way to move bytes, in one process."""

    name: str

    @classmethod
    @abstractmethod
    def open(cls, regions: Regions, settings: LinkSettings) -> Link:
        """The link over this process' ``regions``.

        Raises:
            LinkUnavailable: it can't be used here; the text says why.
        """

    @abstractmethod
    def export(self) -> bytes:
        """What a peer needs to know to reach this process; travels in Hello and Welcome."""

    @abstractmethod
    def connect(self, peer_export: bytes, peer_host: str) -> Channel:
        """Open a channel to the peer that exported ``peer_export``.

        Raises:
            LinkUnavailable: it can't be used with that peer; the text says why.
        """

    @abstractmethod
    def progress(self) -> bool:
        """Advance work under way and run callbacks; True if anything happened."""

    def fileno(self) -> int:
        """A descriptor that turns readable when :meth:`progress` has work; -1 where there is none."""
        return -1

    def arm(self) -> bool:
        """Call before sleeping on :meth:`fileno`; False: don't sleep, call :meth:`progress` first."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Close all channels and give resources back."""


class LinkBusy(Exception):
    """All staging slots are in use; more become free as receivers take what was sent."""
