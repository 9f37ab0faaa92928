"""Measures what a link carries, once a pair: a few scratch batches through the very channel that pages will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pdtransport.errors import LinkError
from pdtransport.kv.geometry import HOST, Region
from pdtransport.links.base import Channel, LinkBusy, Runs

ROUNDS = 3  # the first touches fresh memory and sets lanes up; the best counts
FIRST_KEY = 1 << 55  # keys of pages count up from 1 and never come here


class Scratch:
    """Memory of our own that probes read and write, beside the KV that it stands for; made once, then kept."""

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
    """Address and owner of fresh memory."""
    if device == HOST:
        array = np.empty(nbytes, dtype=np.uint8)  # not touched, so not resident, until a probe
        return array.ctypes.data, array
    from pdtransport.kernels.watch import DeviceMemory

    memory = DeviceMemory(nbytes, device)
    return memory.address, memory


class Asking:
    """The receiver's side: asks for rounds, times each, and says at the end how fast the best one was."""

    def __init__(
        self,
        channel: Channel,
        scratch: Scratch,
        ask: Callable[[int], None],
        done: Callable[[float | None, str], None],
    ) -> None:
        """``ask(nbytes)`` requests one round; ``done(bytes a second, "")`` or ``done(None, why not)`` ends it."""
        self._channel = channel
        self._scratch = scratch
        self._nbytes = min(scratch.nbytes, channel.max_batch_bytes)
        self._ask = ask
        self._done = done
        self._rounds = 0
        self._best = 0.0
        self._waiting = False  # for the answer to a request

    def start(self) -> None:
        self._request()

    def _request(self) -> None:
        self._waiting = True
        self._ask(self._nbytes)

    def offered(self, key: int, offer: bytes, error: str) -> None:
        """The sender's answer to one request; a second one to the same request is ignored."""
        if not self._waiting:
            return
        self._waiting = False
        if error:
            self._done(None, error)
            return
        begun, before = time.perf_counter(), self._channel.stats.seconds_moving

        def placed(problem: str | None) -> None:
            if problem is not None:
                self._done(None, problem)
                return
            # The link's own clock where it has one by now: on a GPU waiting takes longer than moving.
            moving = self._channel.stats.seconds_moving - before
            self._best = max(self._best, self._nbytes / (moving or time.perf_counter() - begun))
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
    """The sender's side: offers its scratch memory, one round at a time."""

    def __init__(self, channel: Channel, scratch: Scratch) -> None:
        self._channel = channel
        self._scratch = scratch
        self._key = FIRST_KEY
        self._offered = False

    def offer(self, nbytes: int) -> tuple[int, bytes]:
        """``(key, offer)`` of the next round; the one before is over.

        Raises:
            LinkError: the channel can't take it now.
        """
        self.end()
        self._key += 1
        try:
            offer, _ = self._channel.send(self._key, self._scratch.source(nbytes), 0, lambda error: None)
        except LinkBusy:
            raise LinkError("all staging slots are in use") from None
        self._offered = True
        return self._key, offer

    def end(self) -> None:
        if self._offered:
            self._offered = False
            self._channel.release(self._key)
