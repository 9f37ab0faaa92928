"""Measures a link's bandwidth once per pair of peers: sends a few scratch batches over the channel that pages will use.

The receiver of pages drives the measurement (:class:`Asking`), the sender offers scratch memory (:class:`Answering`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pdtransport.errors import LinkError
from pdtransport.kv.geometry import HOST, Region
from pdtransport.links.base import Channel, LinkBusy, Runs

ROUNDS = 3  # the best one counts: the first pays for page faults and lane setup
FIRST_KEY = 1 << 55  # link keys of probes; those of KV batches count up from 1 and never get this far


class Scratch:
    """Memory that probes read and write in place of KV, on the same device. Allocated once and kept."""

    def __init__(self, nbytes: int, device: int = HOST) -> None:
        self.nbytes = nbytes
        self._device = device
        self._parts = [_memory(max(nbytes, 8), device) for _ in ("sent", "received")]

    @property
    def regions(self) -> list[Region]:
        nbytes = max(self.nbytes, 8)
        return [Region(address, nbytes, owner, self._device) for address, owner in self._parts]

    def source(self, nbytes: int) -> Runs:
        return np.array([[self._parts[0][0], min(nbytes, self.nbytes)]], dtype=np.uint64)

    def target(self, nbytes: int) -> Runs:
        return np.array([[self._parts[1][0], min(nbytes, self.nbytes)]], dtype=np.uint64)


def _memory(nbytes: int, device: int) -> tuple[int, Any]:
    """Allocate memory; returns its address and the object that owns it."""
    if device == HOST:
        array = np.empty(nbytes, dtype=np.uint8)  # not touched, so not resident, until a probe
        return array.ctypes.data, array
    from pdtransport.kernels.watch import DeviceMemory

    memory = DeviceMemory(nbytes, device)
    return memory.address, memory


class Asking:
    """Receiver's side of a measurement: requests ``ROUNDS`` rounds, times each and reports the fastest."""

    def __init__(
        self,
        channel: Channel,
        scratch: Scratch,
        ask: Callable[[int], None],
        done: Callable[[float | None, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ask(nbytes)`` requests a round; ``done(bytes_per_s, "")`` or ``done(None, why)`` ends the measurement."""
        self._channel = channel
        self._scratch = scratch
        self._nbytes = min(scratch.nbytes, channel.max_batch_bytes)
        self._ask = ask
        self._done = done
        self._clock = clock
        self._rounds = 0
        self._best = 0.0
        self._waiting = False  # for the answer to a request

    def start(self) -> None:
        self._request()

    def _request(self) -> None:
        self._waiting = True
        self._ask(self._nbytes)

    def offered(self, key: int, offer: bytes, error: str) -> None:
        """Handle the sender's answer to a request. A second answer to the same request is ignored."""
        if not self._waiting:
            return
        self._waiting = False
        if error:
            self._done(None, error)
            return
        begun, before = self._clock(), self._channel.stats.seconds_moving

        def placed(problem: str | None) -> None:
            if problem is not None:
                self._done(None, problem)
                return
            # Prefer the link's own timing, if it has any: on a GPU, waiting takes longer than the copy itself.
            moving = self._channel.stats.seconds_moving - before
            self._best = max(self._best, self._nbytes / (moving or self._clock() - begun))
            self._rounds += 1
            if self._rounds < ROUNDS:
                self._request()
            else:
                self._done(self._best, "")

        try:
            self._channel.receive(key, offer, self._scratch.target(self._nbytes), b"", 1, placed)
        except LinkError as error_:
            self._done(None, str(error_))


class Answering:
    """Sender's side of a measurement: offers its scratch memory, one round at a time."""

    def __init__(self, channel: Channel, scratch: Scratch) -> None:
        self._channel = channel
        self._scratch = scratch
        self._key = FIRST_KEY
        self._offered = False

    def offer(self, nbytes: int) -> tuple[int, bytes]:
        """End the previous round, begin the next one and return its ``(key, offer)``.

        Raises:
            LinkError: the channel can't take a batch now.
        """
        self.end()
        self._key += 1
        try:
            offer, _ = self._channel.send(self._key, self._scratch.source(nbytes), 0)
        except LinkBusy:
            raise LinkError("all staging slots are in use") from None
        self._offered = True
        return self._key, offer

    def end(self) -> None:
        if self._offered:
            self._offered = False
            self._channel.release(self._key)
