"""Administration of a running pool by any client: contents, pins, moves between tiers, clearing.

All calls block until they are done. They work in slices, so that loads need not wait for them. Stopping one in the
middle is safe: the slices done so far stay done.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pdtransport.errors import PDTransportError
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool import messages
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.core.index import MEMORY
from pdtransport.pool.core.key_spaces import Space, parse_spaces
from pdtransport.pool.messages import COMING, HARD_PIN, PLAIN, SOFT_PIN, USED, WRITING

STEP_S = 0.005  # between polls of work in progress
STUCK_S = 60.0  # without progress for this long, a call is given up
MAX_BACKLOG = 4096  # jobs queued for lower tiers; a sweep pauses while there are more
WINDOW_BYTES = 64 << 20  # chunks in flight between tiers for one call
BELOW = "below"  # as the target of a move: drop from memory what any lower tier has


class AdminError(PDTransportError):
    """The operation can't be done; the text is one line that says why."""


class Stopped(AdminError):
    """The caller's ``stop`` ended the call."""


@dataclass(frozen=True)
class ChunkTiers:
    """Where a chunk is. ``tiers``: fastest first; empty: the pool does not have it."""

    key: bytes
    tiers: tuple[str, ...]
    nbytes: int
    pin: Literal["none", "soft", "hard"]
    used: bool  # a client reads or writes it
    flags: int

    def public(self) -> dict[str, Any]:
        return {
            "key": self.key.hex(),
            "tiers": list(self.tiers),
            "bytes": self.nbytes,
            "pin": self.pin,
            "used": self.used,
        }


@dataclass(frozen=True)
class AdminOutcome:
    """Result of an action: it holds for ``done`` of the ``of`` chosen chunks that are in the pool."""

    done: int
    of: int


@dataclass(frozen=True)
class Chosen:
    """Chosen chunks: those with these ``keys``; if None, all, or those of one ``tenant``.

    The tenant must have a quota; "" means all tenants without one.
    """

    keys: tuple[bytes, ...] | None = None
    tenant: str | None = None


class PoolAdmin:
    """Administers the pool that ``client`` uses.

    Args:
        stop: called often; once it returns True, calls raise :class:`Stopped`.

    All methods raise PoolUnavailable if there is no pool, or (PoolRefusal) if the pool refuses.
    """

    def __init__(self, client: PoolClient, stop: Callable[[], bool] = lambda: False) -> None:
        self._client, self._stop = client, stop
        self._bits: dict[str, int] = {}  # of tiers, fastest first

    # -- contents ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The pool's status, plus ``held`` (chunks and bytes by tier and tenant) and ``hits`` (:func:`hit_rates`)."""
        status = self._client.status().result()
        return {**status, "held": self._held(), "hits": hit_rates(status)}

    def _held(self) -> list[dict[str, Any]]:
        held: dict[tuple[str, str], list[int]] = {}
        first = 0
        while first >= 0:
            self._go_on()
            part = self._client.count(first).result()
            for tier, tenant, chunks, nbytes in json.loads(part.held):
                of = held.setdefault((tier, tenant), [0, 0])
                of[0] += chunks
                of[1] += nbytes
            first = part.next
        rows = sorted(held.items(), key=lambda item: (self.tier_names.index(item[0][0]), item[0][1]))
        return [{"tier": tier, "tenant": tenant, "chunks": n[0], "bytes": n[1]} for (tier, tenant), n in rows]

    @property
    def tier_names(self) -> list[str]:
        """Names of the tiers, memory included, fastest first."""
        return list(self._tiers())

    def spaces(self) -> list[Space]:
        """The key spaces that engines have reported, the latest first."""
        return parse_spaces(self._client.spaces().result())

    def look(self, keys: Sequence[bytes]) -> list[ChunkTiers]:
        """Where these chunks are."""
        found: list[ChunkTiers] = []
        for some in _cut(keys, messages.MAX_KEYS):
            self._go_on()
            found += self._places(self._client.look(some).result())
        return found

    def sweep(self, tenant: str | None = None) -> Iterator[list[ChunkTiers]]:
        """Iterate over all chunks, or one tenant's, in slices. Chunks stored during the sweep may be missing.

        Raises:
            AdminError: ``tenant`` is not a valid name.
        """
        if tenant is not None and not re.fullmatch(messages.TENANT, tenant):
            raise AdminError(f"{tenant[:80]!r} is not a valid tenant name")
        first = 0
        while first >= 0:
            self._go_on()
            places, first = self.some(first, tenant)
            yield places
            while self._client.look(()).result().backlog > MAX_BACKLOG:
                self._pause()

    def some(self, first: int, tenant: str | None = None) -> tuple[list[ChunkTiers], int]:
        """One slice of a sweep, from index entry ``first`` on, and where the next slice starts (-1: there is none)."""
        part = self._client.look(None, first, tenant=tenant).result()
        return self._places(part), part.next

    def _places(self, part: messages.Looked) -> list[ChunkTiers]:
        bits = self._tiers()
        sizes = np.frombuffer(part.sizes, dtype="<u4").tolist()
        rows = zip(sizes, part.tiers, part.flags, strict=True)
        return [
            ChunkTiers(
                part.keys[KEY_BYTES * i : KEY_BYTES * (i + 1)],
                tuple(name for name, bit in bits.items() if tiers & bit),
                nbytes,
                "hard" if flags & HARD_PIN else "soft" if flags & SOFT_PIN else "none",
                bool(flags & USED),
                flags,
            )
            for i, (nbytes, tiers, flags) in enumerate(rows)
        ]

    def _tiers(self) -> dict[str, int]:
        if not self._bits:
            found = self._client.status().result()["tiers"]
            self._bits = {"memory": MEMORY, **{name: tier["bit"] for name, tier in found.items()}}
        return self._bits

    def _chosen(self, chosen: Chosen) -> Iterator[list[ChunkTiers]]:
        """Iterate in slices over those of the chosen chunks that are in the pool."""
        slices: Iterable[list[ChunkTiers]] = self.sweep(chosen.tenant)
        if chosen.keys is not None:
            slices = (self.look(some) for some in _cut(chosen.keys, messages.MAX_KEYS))
        for some in slices:
            yield [place for place in some if place.tiers]

    # -- actions on chunks ------------------------------------------------------------------------------------------

    def pin(self, chosen: Chosen, pin: Literal["none", "soft", "hard"], for_s: float | None = None) -> AdminOutcome:
        """Pin these chunks in memory, for ``for_s`` seconds if it is given; "none" unpins them.

        Chunks in lower tiers are read into memory first. Hard pins may hold half of the memory at most.
        """
        if pin != "none":
            self.prefetch(chosen)
        done = of = 0
        for places in self._chosen(chosen):
            of += len(places)
            for some in _cut([place.key for place in places], messages.MAX_MANAGED):
                self._go_on()
                done += self._client.manage(some, "pin", pin=pin, for_s=for_s).result()
        return AdminOutcome(done, of)

    def drop(self, chosen: Chosen) -> AdminOutcome:
        """Remove these chunks from all tiers, pinned ones too. A client that is reading a chunk can finish."""
        done = of = 0
        for places in self._chosen(chosen):
            of += len(places)
            for some in _cut([place.key for place in places], messages.MAX_MANAGED):
                self._go_on()
                done += self._client.manage(some, "drop").result()
        return AdminOutcome(done, of)

    def clear(self, tenant: str | None = None) -> AdminOutcome:
        """Remove all chunks, or those of one tenant with a quota ("": of all tenants without one)."""
        return self.drop(Chosen(tenant=tenant))

    def prefetch(self, chosen: Chosen) -> AdminOutcome:
        """Read these chunks into memory. If they don't all fit, later ones evict earlier ones."""
        return self._in_windows(chosen, self._bring_up)

    def move(self, chosen: Chosen, to: str) -> AdminOutcome:
        """Move these chunks to tier ``to`` and out of memory. Pinned chunks and chunks in use stay in memory.

        Args:
            to: a tier. "memory": as :meth:`prefetch`. "below": drop from memory the chunks that a lower tier has.

        Raises:
            AdminError: there is no such tier.
        """
        if to == "memory":
            return self.prefetch(chosen)
        if to != BELOW and to not in self._tiers():
            raise AdminError(f"this pool has no tier {to!r}: choose one of {', '.join([*self.tier_names, BELOW])}")
        return self._in_windows(chosen, lambda places: self._push_down(places, to))

    def compress(self, chosen: Chosen) -> AdminOutcome:
        """Rewrite these chunks in tiers that have a codec but hold them unpacked.

        Chunks that the codec does not make shorter stay unpacked.

        Raises:
            AdminError: no tier has a codec.
        """
        tiers = self._client.status().result()["tiers"]
        packing = [name for name, tier in tiers.items() if tier["packs"]]
        if not packing:
            raise AdminError("no tier of this pool has a codec: start it with one, such as --disk-codec zstd")
        return self._in_windows(chosen, lambda places: self._pack(places, packing))

    # -- steps ------------------------------------------------------------------------------------------------------

    def _in_windows(self, chosen: Chosen, step: Callable[[list[ChunkTiers]], int]) -> AdminOutcome:
        """Call ``step`` for one window of chunks after the other; it returns for how many of them the action holds.

        A window has as many chunks as may be in flight between tiers at a time.
        """
        status = self._client.status().result()
        room = max(1, min(WINDOW_BYTES, status["memory"]["bytes"] // 8, status["writeback_limit"] or 1))
        done = of = 0
        for places in self._chosen(chosen):
            of += len(places)
            while places:
                count = size = 0
                while count < min(len(places), messages.MAX_MANAGED) and (
                    not count or size + places[count].nbytes <= room
                ):
                    size += places[count].nbytes
                    count += 1
                done += step(places[:count])
                places = places[count:]
        return AdminOutcome(done, of)

    def hint(self, keys: Sequence[bytes]) -> int:
        """Begin to read chunks of a prompt into memory, and don't wait; returns how many reads have begun.

        All of the chunks must be below memory.
        """
        begun = 0
        for some in _cut(keys, messages.MAX_MANAGED):
            count = self._client.manage(some, "hint").result()
            begun += count
            if count < len(some):
                break
        return begun

    def _bring_up(self, places: list[ChunkTiers]) -> int:
        return sum("memory" in place.tiers for place in self._fetch(places))

    def _fetch(self, places: list[ChunkTiers]) -> list[ChunkTiers]:
        below = [place.key for place in places if "memory" not in place.tiers]
        if below:
            self._client.manage(below, "fetch").result()
        return self._settled(places)

    def _write(self, keys: list[bytes], tier: str, again: bool = False) -> None:
        """Begin to write chunks to a tier, as far as it has room and the write-back limit allows."""
        if keys:
            self._client.manage(keys, "write", tier=tier, again=again).result()

    def _push_down(self, places: list[ChunkTiers], to: str) -> int:
        if to != BELOW:
            lacking = [place for place in places if to not in place.tiers]
            up = [place.key for place in self._fetch(lacking) if "memory" in place.tiers] if lacking else []
            self._write(up, to)
            places = self._settled(places)
        there = [place.key for place in places if to in place.tiers or (to == BELOW and len(place.tiers) > 1)]
        if there:
            self._client.manage(there, "leave").result()
        after = self.look([place.key for place in places])
        return sum("memory" not in place.tiers and (to in place.tiers or to == BELOW) for place in after)

    def _pack(self, places: list[ChunkTiers], tiers: list[str]) -> int:
        plain = [place for place in places if place.flags & PLAIN and set(tiers) & set(place.tiers)]
        if not plain:
            return len([place for place in places if len(place.tiers) > 1 or "memory" not in place.tiers])
        up = [place for place in self._fetch(plain) if "memory" in place.tiers]
        for tier in tiers:
            self._write([place.key for place in up if tier in place.tiers], tier, again=True)
        self._settled(plain)
        were_below = [place.key for place in plain if "memory" not in place.tiers]
        if were_below:
            self._client.manage(were_below, "leave").result()
        after = self.look([place.key for place in places])
        return sum(place.tiers not in ((), ("memory",)) and not place.flags & PLAIN for place in after)

    def _settled(self, places: list[ChunkTiers]) -> list[ChunkTiers]:
        """Wait until none of these chunks is in flight between tiers; returns their new state.

        Raises:
            AdminError: no progress for ``STUCK_S``.
        """
        keys, last, since = [place.key for place in places], -1, time.monotonic()
        while True:
            found = self.look(keys)
            under_way = sum(bool(place.flags & (COMING | WRITING)) for place in found)
            if not under_way:
                return found
            if under_way != last:
                last, since = under_way, time.monotonic()
            elif time.monotonic() - since > STUCK_S:
                raise AdminError(
                    f"{under_way} chunks have been in flight for {STUCK_S:g} s without progress: a tier may hang"
                )
            self._pause()

    def _pause(self) -> None:
        self._go_on()
        time.sleep(STEP_S)

    def _go_on(self) -> None:
        if self._stop():
            raise Stopped("stopped")


def hit_rates(status: dict[str, Any]) -> dict[str, Any]:
    """Hit rates from a pool's status: of keys looked up, and of chunks loaded, by where they were found.

    Each is between 0 and 1, or None if there was no lookup or load yet.
    """
    counters: dict[str, int] = status["counters"]
    of_loads = {name: counters.get(f"{name}_hits", 0) for name in ("memory", *status["tiers"], "waited")}
    of_loads["missed"] = counters.get("miss", 0)
    looked, loads = counters.get("lookup_keys", 0), sum(of_loads.values())
    return {
        "lookups": counters.get("lookups", 0),
        "keys": looked,
        "found": _share(counters.get("lookup_hits", 0), looked),
        "found_in_memory": _share(counters.get("lookup_hits_memory", 0), looked),
        "loads": loads,
        "loaded_from": {name: {"chunks": count, "share": _share(count, loads)} for name, count in of_loads.items()},
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _cut(keys: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for first in range(0, len(keys), size):
        yield keys[first : first + size]
