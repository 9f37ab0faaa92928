"""Links that move cells between simulated memories, slowly, and with faults.

``direct``: the receiver reads the sender's pages themselves, whatever is in them by then; only checksums tell.
``slots``: the sender copies a batch into one of few slots, from where the receiver fetches it. Both may be used by a
pair, if its plan does not say otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from pdtransport.control.events import PeerId
from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.links.base import Channel, Done, Link, LinkBusy, LinkStats, Prepared, Runs
from pdtransport.links.memory import Regions
from pdtransport.settings import LinkSettings
from tests.sim.memory import DAMAGE, Violation, checksum
from tests.sim.plan import HEAD_BYTES, SLOW_BYTES_S

if TYPE_CHECKING:
    from tests.sim.worker import Worker

LEAST_S = 1e-4  # no copy takes less


@dataclass(frozen=True, eq=False)
class Offered:
    """What a receiver may still fetch."""

    key: int
    runs: list[tuple[int, int]]
    copy: list[list[int]] | None  # in a slot; None: the receiver reads the pages themselves


@dataclass(eq=False)
class Reading:
    """A batch on its way into our pages."""

    key: int
    source: int  # number of the offer
    runs: list[tuple[int, int]]
    checksums: bytes
    done: Done
    left: int
    began: float
    sums: dict[int, bytes] = field(default_factory=dict)
    over: bool = False  # nothing of it is written any more
    fenced: bool = False  # nothing of it is told any more


class SimLink(Link):
    memory = ("host",)
    one_host = False

    def __init__(self, name: str, worker: Worker) -> None:
        self.name = name  # type: ignore[misc]
        self.worker = worker
        self.world = worker.world
        self.channels: list[SimChannel] = []
        self.offers: list[Offered] = []  # never forgotten: addresses that receivers know
        self.calls = 0  # of a channel, by the drivers
        self._finished: deque[tuple[Reading | None, Callable[[], None]]] = deque()

    @classmethod
    def open(cls, regions: Regions, settings: LinkSettings) -> Link:
        raise NotImplementedError

    def export(self) -> bytes:
        return f"{self.worker.id.engine} {self.worker.id.rank} {self.worker.id.incarnation}".encode()

    def connect(self, peer_export: bytes, peer_host: str) -> Channel:
        engine, rank, incarnation = peer_export.decode().split()
        peer = PeerId(engine, int(rank), int(incarnation))
        kind, receiving = self.world.kind_of(self.worker.id, peer), self.world.receives(self.worker.id)
        if self.name == "direct" and (kind == "slots" or (kind == "half" and not receiving)):
            raise LinkUnavailable(f"{peer} is on another host")
        channel = SimChannel(self, peer, slow=kind == "slow" and self.name == "direct")
        self.channels.append(channel)
        return channel

    def progress(self) -> bool:
        work, self._finished = self._finished, deque()
        for reading, call in work:
            if reading is None or not reading.fenced:
                call()
        return bool(work)

    def arm(self) -> bool:
        return not self._finished

    def later(self, reading: Reading | None, call: Callable[[], None]) -> None:
        """Report an end in the worker's next turn; that of a reading not once it is fenced."""
        self._finished.append((reading, call))
        self.worker.wake()

    @property
    def free_slots(self) -> int:
        used = sum(offered.copy is not None for channel in self.channels for offered in channel.offered.values())
        return self.world.plan.bytes.slots - used

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


class SimChannel(Channel):
    def __init__(self, link: SimLink, peer: PeerId, *, slow: bool) -> None:
        self.link, self.why, self.in_place = link.name, "simulated", link.name == "direct"
        self.stats = LinkStats()
        self.peer = peer
        self.offered: dict[int, Offered] = {}
        self.readings: list[Reading] = []
        self._link, self._worker, self._world, self._slow = link, link.worker, link.world, slow
        self._fences: list[Callable[[], None]] = []
        self._prepared: dict[bytes, list[tuple[int, int]]] = {}
        self._closed = False
        if not self.in_place:
            self.max_batch_bytes = self._world.plan.bytes.slot_bytes

    # -- sender --------------------------------------------------------------------------------------------------

    def prepare(self, runs: Runs, checksum_blocks: int, event_handle: int) -> Prepared | None:
        if not self.in_place or self._closed:
            return None
        offer = len(self._link.offers).to_bytes(8, "little")
        self._link.offers.append(Offered(0, _listed(runs), None))
        return Prepared(offer)

    def send(self, key: int, runs: Runs, checksum_blocks: int, prepared: Prepared | None = None) -> tuple[bytes, bytes]:
        if self._closed:
            raise LinkError("the channel is closed")
        if not self.in_place and self._link.free_slots <= 0:
            raise LinkBusy
        self._link.calls += 1
        if self._fault("error"):
            raise LinkError("the send failed")
        where = _listed(runs)
        memory = self._worker.memory
        if sum(run[1] for run in where) > self.max_batch_bytes:
            raise LinkError("the batch is longer than a slot")
        if key in self.offered:
            raise Violation(f"{self._worker} offers key {key} twice")
        cells = [memory.read(run) for run in where]
        if prepared is not None:
            number = int.from_bytes(prepared.offer, "little")
            if self._link.offers[number].runs != where:
                raise Violation(f"{self._worker} sends what was prepared for other memory")
        else:
            number = len(self._link.offers)
            self._link.offers.append(Offered(key, where, None if self.in_place else cells))
        self.offered[key] = self._link.offers[number]
        self.stats.batches_sent += 1
        sums = b"".join(checksum(each) for each in cells) if checksum_blocks else b""
        return number.to_bytes(8, "little"), sums

    def release(self, key: int) -> None:
        self._link.calls += 1
        self.offered.pop(key, None)

    # -- receiver ------------------------------------------------------------------------------------------------

    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        self._link.calls += 1
        if self._closed:
            raise LinkError("the channel is closed")
        where = _listed(runs)
        reading = Reading(key, int.from_bytes(offer, "little"), where, checksums, done, len(where), self._world.now)
        self._worker.reads(self.peer, key, where)
        self.readings.append(reading)
        if not where:
            self._world.at(LEAST_S, self._worker, self._end, reading, "link: the offer is longer than what is expected")
        for index, run in enumerate(where):
            delay = self._world.rng.uniform(0.0, self._world.plan.bytes.copy_delay)
            if self._slow:
                delay = run[1] / SLOW_BYTES_S
            self._world.at(max(LEAST_S, delay), self._worker, self._copy, reading, index)

    def _copy(self, reading: Reading, index: int) -> None:
        """Fetch one block, and sum it up."""
        if reading.over:
            return
        cells, problem = self._fetch(reading, index)
        if problem:
            self._end(reading, problem)
            return
        run = reading.runs[index]
        if self._fault("corrupt"):
            cells[-1] ^= DAMAGE
        if self._worker.memory.where(run) is not None:
            self._worker.writes(self.peer, reading.key, run)
            self._worker.memory.write(run, cells)
            cells = self._worker.memory.read(run)
        reading.sums[index] = checksum(cells)
        reading.left -= 1
        if reading.left == 0:
            found = b"".join(reading.sums[at] for at in range(len(reading.runs)))
            self._end(reading, "damaged: wrong checksum" if reading.checksums and found != reading.checksums else None)

    def _fetch(self, reading: Reading, index: int) -> tuple[list[int], str]:
        """What the sender has there right now, or why there is nothing."""
        source = self._world.worker(self.peer)
        if source is None:
            return [], "link: the process is gone"
        if self._fault("error"):
            return [], "link: the copy failed"
        link = source.links[self.link]
        offered: Offered = link.offers[reading.source]
        if source.memory.where(offered.runs[0]) is None:
            return [0] * (offered.runs[0][1] // HEAD_BYTES), ""  # scratch memory, of a measurement
        if self.in_place:
            return source.memory.read(offered.runs[index]), ""
        if not any(offered in channel.offered.values() for channel in link.channels):
            return [], "damaged: the sender withdrew the batch"
        assert offered.copy is not None
        return list(offered.copy[index]), ""

    def _end(self, reading: Reading, error: str | None) -> None:
        if reading.over:
            return
        reading.over = True
        if error is None:
            self.stats.batches_received += 1
            self.stats.bytes_received += sum(run[1] for run in reading.runs)
            self.stats.seconds_moving += self._world.now - reading.began
            self._worker.verified(self.peer, reading.key, reading.runs)
        if self._world.tracing:
            self._world.say(f"{self._worker} placed key {reading.key} of {self.peer}: {error or 'good'}")
        self._link.later(reading, partial(self._tell, reading, error))

    def _tell(self, reading: Reading, error: str | None) -> None:
        if reading in self.readings:
            self.readings.remove(reading)
            reading.done(error)

    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        self._link.calls += 1

        def fenced() -> None:
            if fenced in self._fences:
                self._fences.remove(fenced)
                self._stop(set(keys))
                self._link.later(None, done)

        self._fences.append(fenced)
        delay = self._world.rng.uniform(0.0, self._world.plan.bytes.fence_delay)
        self._world.at(delay, self._worker, fenced)

    def _stop(self, keys: set[int]) -> None:
        for reading in [reading for reading in self.readings if reading.key in keys]:
            reading.over = reading.fenced = True
            self.readings.remove(reading)

    # -- both ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.offered.clear()
        readings, self.readings = self.readings, []
        for reading in readings:
            reading.over = True
            end = partial(reading.done, "link: the channel is closed")
            if self.in_place:
                end()
            else:
                self._link.later(reading, end)
        for fenced in list(self._fences):
            fenced()

    def _fault(self, name: str) -> bool:
        rate = getattr(self._world.plan.bytes, name)
        return bool(rate) and self._world.faulty and self._world.rng.random() < rate


def _listed(runs: Runs) -> list[tuple[int, int]]:
    return [(address, nbytes) for address, nbytes in runs.tolist()]
