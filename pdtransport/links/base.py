"""The interface of all links: a link moves bytes from one process's registered memory into another's.

A link copies *runs* (address, length) of the sender's memory into runs of the receiver's memory. The two lists may be
fragmented differently; both describe the same byte stream in the same order.

Threading: all methods are called from the transport's I/O thread, and none may block longer than moving one batch
takes. A link with work in flight makes progress in :meth:`Link.progress`; :meth:`Link.fileno` wakes the I/O thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pdtransport.kv.geometry import Region as Region  # links register these
from pdtransport.links.memory import Regions
from pdtransport.settings import LinkSettings

# shape (n, 2), dtype uint64: [address, nbytes] of each run, in stream order
Runs = npt.NDArray[np.uint64]

MemoryKind = Literal["host", "gpu"]

# Called once when an operation ends, with None on success, else with one line that says why it failed.
Done = Callable[["str | None"], None]


@dataclass
class LinkStats:
    """Counters of one channel since it was opened.

    Seconds count the time during which at least one batch was moving; time spent in a queue does not count.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    batches_sent: int = 0
    batches_received: int = 0
    seconds_moving: float = 0.0  # of received batches
    seconds_sending: float = 0.0  # of sent batches; stays 0 on links where the receiver reads by itself
    errors: int = 0

    @property
    def bandwidth(self) -> float | None:
        """Measured bytes per second, or None.

        Of the direction that this side measured; receiving takes precedence if it measured both.
        """
        if self.bytes_received and self.seconds_moving > 0:
            return self.bytes_received / self.seconds_moving
        if self.bytes_sent and self.seconds_sending > 0:
            return self.bytes_sent / self.seconds_sending
        return None


@dataclass(frozen=True)
class Prepared:
    """Result of :meth:`Channel.prepare`; ``offer`` is what :meth:`Channel.send` will return as the batch's offer."""

    offer: bytes


class Channel(ABC):
    """One link to one incarnation of a peer."""

    link: str
    why: str  # one line: why this link was chosen for the pair, and better ones were not
    max_batch_bytes: int = 1 << 40  # largest batch that `send` accepts
    stats: LinkStats

    def prepare(self, runs: Runs, checksum_blocks: int, event_handle: int) -> Prepared | None:
        """Do the part of a :meth:`send` that can be queued before the pages are computed (GPU memory only).

        The kernels that compute the pages may still be running; ``event_handle`` is the raw cudaEvent_t recorded after
        them. Pass the result to the one matching ``send`` after the event, or drop it. Returns None if preparing gains
        nothing.
        """
        return None

    @abstractmethod
    def send(self, key: int, runs: Runs, checksum_blocks: int, prepared: Prepared | None = None) -> tuple[bytes, bytes]:
        """Offer ``runs`` under ``key`` (unique per channel, < 2**56). They may be read until :meth:`release`.

        A read in progress at the release may continue: its receiver detects changed pages by checksums or tickets.

        Args:
            checksum_blocks: number of equally long blocks in the stream, one checksum each; 0: no checksums.
            prepared: result of :meth:`prepare` for this batch, if any.

        Returns:
            ``(offer, checksums)``: the offer goes to the receiver's :meth:`receive`; checksums are little-endian u64,
            one per block.

        Raises:
            LinkBusy: no staging slot is free; retry after :meth:`Link.progress`.
            LinkError: the channel is broken.
        """

    @abstractmethod
    def release(self, key: int) -> None:
        """Forget ``key``: the receiver has the batch or will never request it. Unknown keys are ignored."""

    def attach(self) -> None:  # noqa: B027 - most links need nothing
        """Acquire what receiving needs of the peer, such as a mapping of its memory.

        Only receivers call it, so that senders never pin receiver memory.

        Raises:
            LinkUnavailable: it can't be acquired; the text says why.
        """

    def prepare_read(self, offer: bytes, runs: Runs, blocks: int) -> None:  # noqa: B027 - most links have nothing to gain
        """Prepare for receiving a batch that is expected with this ``offer`` into ``runs``.

        Do the part of :meth:`receive` that touches neither side's pages. ``blocks`` is 0 if the batch has no checksums.
        Never raises. The batch may never arrive, or a different one may.
        """

    @abstractmethod
    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        """Place batch ``key`` into ``runs`` and verify its ``checksums``.

        The stream holds ``blocks`` equally long blocks; empty ``checksums``: nothing is verified. Calls ``done(None)``
        after every byte is in place and verified, and ``done("damaged: ...")`` on a checksum mismatch. Only this
        process writes into ``runs``, and nothing is written after ``done`` or :meth:`fence`.
        """

    @abstractmethod
    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        """Receiver: stop placing ``keys``; calls ``done()`` once no byte of them can be written any more.

        The ``done`` callbacks that :meth:`receive` got for these keys are not called after that.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop all work because the peer's incarnation ended.

        Pending callbacks get an error, now or in the next :meth:`Link.progress`. Never blocks for long, never raises.
        """

    def give_up(self) -> None:
        """Like :meth:`close`, for a peer that may only be stopped (SIGSTOP) rather than dead.

        Messages that have begun may finish before the resources that carry them are destroyed.
        """
        self.close()


class Link(ABC):
    """One way to move bytes, for one process.

    Found by name (:mod:`pdtransport.links.registry`). Class attributes state its capabilities.
    """

    name: ClassVar[str]  # as in `links.order`
    memory: ClassVar[tuple[MemoryKind, ...]]  # kinds of memory that it can move pages of; it is skipped for any other
    one_host: ClassVar[bool]  # True: both ends must be processes of one host
    # True: a page that the engine overwrites while it moves arrives without an error, and only its checksum shows it.
    # False: the link itself ensures that the bytes that arrive are those present when `send` was called.
    needs_checksums: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def open(cls, regions: Regions, settings: LinkSettings) -> Link:
        """Open the link over this process's ``regions``.

        Raises:
            LinkUnavailable: the link can't be used here; the text says why.
        """

    @abstractmethod
    def export(self) -> bytes:
        """Data that a peer needs to connect to this process; sent in Hello and Welcome."""

    @abstractmethod
    def connect(self, peer_export: bytes, peer_host: str) -> Channel:
        """Open a channel to the peer that exported ``peer_export``.

        Raises:
            LinkUnavailable: the link can't be used with that peer; the text says why.
        """

    @abstractmethod
    def progress(self) -> bool:
        """Advance work in flight and run callbacks; True if anything happened."""

    def fileno(self) -> int:
        """File descriptor that becomes readable when :meth:`progress` has work; -1 if the link has none."""
        return -1

    def arm(self) -> bool:
        """Call before sleeping on :meth:`fileno`; False means: call :meth:`progress` instead of sleeping."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Close all channels and release resources."""


class LinkBusy(Exception):
    """All staging slots are in use; slots become free as receivers fetch what was sent."""
