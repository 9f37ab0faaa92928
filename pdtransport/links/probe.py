"""Measures a channel once per pair: moves batches of scratch memory with the same calls as production batches.

Sans-IO: bodies of LinkCall messages in, bodies out (msgpack maps whose ``op`` begins with ``probe``). The receiver of
pages runs a :class:`Probe`; the sender answers with a :class:`ProbeSource`. Neither blocks, waits or reads a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgpack
import numpy as np

from pdtransport.errors import LinkError
from pdtransport.kernels.runs import Runs
from pdtransport.kv.geometry import HOST, Region
from pdtransport.links.base import Channel, LinkBusy
from pdtransport.links.memory import PAGE, Regions

OPS = ("probe?", "probe", "probe-busy", "probe-end")
FIRST_KEY = 1 << 55  # keys of real transfers count up from 1
IN_FLIGHT = 2  # batches requested ahead of what has arrived
DEADLINE_S = 10.0  # for a whole probe; after that the pair's rate is reported as unknown
MAX_BATCH_BYTES = 256 << 20
PROBE_PAGE = 32 << 10  # scratch pages are moved in shuffled order, like a fragmented cache


def scratch(nbytes: int, device: int) -> Region:
    """Allocate scratch memory on ``device``, ready to be registered."""
    if device == HOST:
        array = np.zeros(nbytes, dtype=np.uint8)
        return Region(array.ctypes.data, nbytes, owner=array)
    from pdtransport.kernels.watch import DeviceMemory

    memory = DeviceMemory(nbytes, device)
    return Region(memory.address, nbytes, owner=memory, device=device)


class _Scratch:
    """``nbytes`` bytes of scratch memory, registered while a probe runs."""

    def __init__(self, regions: Regions, nbytes: int) -> None:
        self._regions = regions
        self._region = scratch(nbytes, regions.device)
        regions.add(self._region)

    def runs(self) -> Runs:
        nbytes = self._region.nbytes
        starts = np.arange(0, nbytes, PROBE_PAGE, dtype=np.uint64)
        runs = np.empty((len(starts), 2), dtype=np.uint64)
        runs[:, 0] = starts + np.uint64(self._region.address)
        runs[:, 1] = np.minimum(np.uint64(PROBE_PAGE), np.uint64(nbytes) - starts)
        shuffled: Runs = np.random.default_rng(0).permutation(runs)
        return shuffled

    def close(self) -> None:
        self._regions.remove(self._region)


class Probe:
    """The receiver's half: requests ``nbytes`` in batches and times them.

    Drain :meth:`outbox` after each call and after each ``Link.progress``. ``done`` turns True once; then ``rate`` is in
    bytes per second, or None with the reason in ``why``, and ``elapsed_s`` is the time that the bytes took.

    Args:
        channel: channel over which the peer sends to us.
        regions: where to register the scratch memory.
        nbytes: bytes to move in all; at least one batch.
        batch_bytes: bytes per batch.
        now: start time in seconds, on the clock of all later times.
    """

    def __init__(self, channel: Channel, regions: Regions, nbytes: int, batch_bytes: int, now: float) -> None:
        self._batch = max(PAGE, min(nbytes, batch_bytes) // PAGE * PAGE)
        self._left = self._arriving = max(1, nbytes // self._batch)
        self._total = self._left * self._batch
        self._channel, self._scratch = channel, _Scratch(regions, self._batch)
        self._began, self._now = now, now
        self._keys: set[int] = set()
        self._out: list[bytes] = []
        self.done, self.why, self.elapsed_s = False, "", 0.0
        self.rate: float | None = None
        for _ in range(min(IN_FLIGHT, self._left)):
            self._ask()

    def outbox(self) -> list[bytes]:
        out, self._out = self._out, []
        return out

    def on_call(self, body: Mapping[str, Any], now: float) -> None:
        """Handle a body from the peer whose ``op`` is in :data:`OPS`."""
        self._now = now
        if self.done:
            return
        if body.get("op") == "probe-busy":
            self._end(None, "the peer had no staging slot free")
        elif body.get("op") == "probe":
            try:
                key, offer = int(body["key"]), bytes(body["offer"])
                self._keys.add(key)
                self._channel.receive(key, offer, self._scratch.runs(), b"", 1, partial(self._arrived, key))
            except (LinkError, KeyError, TypeError, ValueError) as error:
                self._end(None, f"{type(error).__name__}: {error}")

    def tick(self, now: float) -> None:
        """Call every turn while not ``done``: updates the time, and ends an overdue probe."""
        self._now = now
        if not self.done and now - self._began > DEADLINE_S:
            self._end(None, f"it did not end within {DEADLINE_S:.0f} s")

    def _ask(self) -> None:
        self._left -= 1
        self._out.append(msgpack.packb({"op": "probe?", "nbytes": self._batch}))

    def _arrived(self, key: int, error: str | None) -> None:
        self._keys.discard(key)
        if self.done:
            return
        self._arriving -= 1
        if error is not None:
            self._end(None, error)
        elif self._arriving == 0:
            self._end(self._total, "")
        elif self._left > 0:
            self._ask()

    def _end(self, moved: int | None, why: str) -> None:
        self.done, self.why = True, why
        self.elapsed_s = max(self._now - self._began, 1e-9)
        if moved is not None:
            self.rate = moved / self.elapsed_s
        self._out.append(msgpack.packb({"op": "probe-end"}))
        self._channel.fence(sorted(self._keys), self._scratch.close)
        self._keys.clear()


class ProbeSource:
    """The sender's half, one per peer: offers scratch batches on request.

    Args:
        channel: channel over which we send to the peer.
        regions: where to register the scratch memory.
    """

    def __init__(self, channel: Channel, regions: Regions) -> None:
        self._channel, self._regions = channel, regions
        self._scratch: _Scratch | None = None
        self._next_key = FIRST_KEY
        self._keys: list[int] = []

    def on_call(self, body: Mapping[str, Any]) -> list[bytes]:
        """Returns the bodies to answer with; invalid input gets no answer."""
        if body.get("op") == "probe-end":
            self.close()
        if body.get("op") != "probe?":
            return []
        nbytes = body.get("nbytes")
        if not isinstance(nbytes, int) or not PAGE <= nbytes <= MAX_BATCH_BYTES:
            return []
        if len(self._keys) >= IN_FLIGHT:  # a further request means that the oldest batch has arrived
            self._channel.release(self._keys.pop(0))
        key, self._next_key = self._next_key, self._next_key + 1
        try:
            if self._scratch is None:
                self._scratch = _Scratch(self._regions, nbytes)
            offer, _ = self._channel.send(key, self._scratch.runs(), 0, lambda error: None)
        except (LinkBusy, LinkError):
            return [msgpack.packb({"op": "probe-busy"})]
        self._keys.append(key)
        return [msgpack.packb({"op": "probe", "key": key, "offer": offer})]

    def close(self) -> None:
        """Release everything: the probe ended, or the peer is gone."""
        for key in self._keys:
            self._channel.release(key)
        self._keys.clear()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
