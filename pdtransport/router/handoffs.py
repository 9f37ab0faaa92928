"""Outcome of each hand-off, as reported by decode's workers, and the health of each pair of servers.

A worker sends its report before its engine's first step on the pages, so the report is here before decode's first
bytes. The answer's headers can state the outcome at the price of a dictionary lookup.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pdtransport.protocol.messages import Code, Ended
from pdtransport.router.call import Reason
from pdtransport.router.endpoints import Endpoint, Fleet
from pdtransport.router.metrics import Metrics
from pdtransport.router.settings import RouterHandOff
from pdtransport.router.traces import MAX_WHY_CHARS

log = logging.getLogger("pdtransport.router")

# failed: decode computes the prompt itself or fails the request, depending on its kv_load_failure_policy.
Became = Literal["handed_over", "held", "failed", "unknown"]

MAX_PAIRS = 4096  # remembered pairs; beyond that the least recently used are dropped
WARN_EVERY_S = 60.0
MISSES_IN_ROW = 8  # late or missing reports in a row, after which requests no longer wait for one
NO_HANDOVER = "no_handover"
REFUSED = "prefill_refused"
UNFIT = {"prefill": "prefill_not_a_producer", "decode": "decode_not_a_consumer"}
_LEFT = frozenset({Code.CANCELLED.value, Code.PEER_CANCELLED.value})  # the client left: not the pair's fault
_REMEDIES = {
    Code.REFUSED.value: "make the named property equal on both, or remove the prefill server",
    REFUSED: "start prefill with the same flags, adapters and length as decode",
    NO_HANDOVER: "start prefill with PDTransportConnector and kv_role kv_producer, or remove it",
    Code.PEER_LOST.value: "check that decode can reach prefill's control.host and control.port",
    Code.LINK.value: "check the links in the workers' status (/pd/status?workers=1)",
    Code.UNKNOWN.value: "prefill's request failed or went to another engine: check its log",
}


@dataclass(frozen=True, slots=True)
class HandoffEnd:
    """How a hand-off ended.

    ``link`` and the figures are set if it succeeded; seconds are those of the slowest rank.
    """

    became: Became
    code: str = ""
    reason: str = ""
    link: str = ""
    nbytes: int = 0
    exposed_s: float = 0.0  # from the end of prefill to the last verified page
    taken_s: float = 0.0  # from the first batch to the last verified page


@dataclass(eq=False, slots=True)
class HandOff:
    """The hand-off of one dispatch."""

    transfer_id: str
    prefill: str
    decode: Endpoint
    noted: dict[str, Any]  # the dispatch's entry in the trace; the outcome is written here
    verdict: HandoffEnd | None = None
    _good: dict[int, Ended] = field(default_factory=dict)  # by rank
    _waiter: asyncio.Future[None] | None = None

    def hear(self, rank: int, ranks: int, ended: Ended) -> HandoffEnd | None:
        """Take one rank's report; returns the verdict if this report decides it."""
        if ended.code is not None:
            return HandoffEnd("failed", ended.code.value, ended.reason)
        self._good[rank] = ended
        if len(self._good) < ranks:
            return None
        parts = self._good.values()
        if not any(part.blocks for part in parts):
            return HandoffEnd("held")
        return HandoffEnd(
            "handed_over",
            link=max(part.link for part in parts),
            nbytes=sum(part.nbytes for part in parts),
            exposed_s=max(part.exposed_us for part in parts) / 1e6,
            taken_s=max(part.taken_us for part in parts) / 1e6,
        )

    @property
    def held(self) -> bool:
        """Decode had the whole prompt: it asked for no pages, and promised nothing."""
        return self.verdict is not None and self.verdict.became == "held"

    async def heard(self, timeout_s: float) -> bool:
        """Wait for the verdict; True if there is one."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait({self._waiter}, timeout=timeout_s)
        finally:
            self._waiter = None
        return self.verdict is not None

    def decide(self, verdict: HandoffEnd) -> None:
        self.verdict = verdict
        self.noted["hand_off"] = verdict.became
        self.noted["handed_over"] = {"handed_over": True, "failed": False}.get(verdict.became)
        self.noted["hand_off_code"] = verdict.code or None
        self.noted["hand_off_reason"] = verdict.reason[:MAX_WHY_CHARS] or None
        if verdict.became == "handed_over":
            rate = verdict.nbytes / verdict.taken_s if verdict.taken_s else None
            self.noted |= {
                "link": verdict.link,
                "bytes": verdict.nbytes,
                "exposed_s": verdict.exposed_s,
                "rate_bytes_s": None if rate is None else round(rate),
            }
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True)
class _Pair:
    """Health of hand-offs between two servers."""

    missed: int = 0  # failed hand-offs in a row
    last: HandoffEnd | None = None
    warned_at: float | None = None
    failing: bool = False  # it was logged


class HandOffs:
    """Hand-offs in flight, and the health of pairs.

    ``why_not`` says why a decode server's transfers are not reported; empty if they are.
    """

    def __init__(self, settings: RouterHandOff, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._live: dict[str, HandOff] = {}
        self._pairs: OrderedDict[tuple[str, str], _Pair] = OrderedDict()
        self._late: Counter[str] = Counter()  # by decode server: reports in a row that were late or missing
        self.why_not: Callable[[Endpoint], str] = lambda _: "nobody watches"

    def begin(self, transfer_id: str, prefill: Endpoint, decode: Endpoint, noted: dict[str, Any]) -> HandOff:
        hand_off = HandOff(transfer_id, prefill.name, decode, noted)
        noted |= {"hand_off": "under way", "handed_over": None}
        self._live[transfer_id] = hand_off
        return hand_off

    def hear(self, decode: Endpoint, rank: int, ranks: int, ended: Ended) -> None:
        """Take the report of a worker of ``decode``.

        Reports of transfers that belong to another router, or to another decode server, are ignored.
        """
        hand_off = self._live.get(ended.transfer)
        if hand_off is None or hand_off.verdict is not None or hand_off.decode is not decode:
            return
        self._late[hand_off.decode.name] = 0
        verdict = hand_off.hear(rank, ranks, ended)
        if verdict is not None:
            hand_off.decide(verdict)

    async def wait(self, hand_off: HandOff) -> None:
        """Wait for the verdict once decode's answer has begun; if it does not come in time, note why."""
        if hand_off.verdict is not None:
            return
        why = self.why_not(hand_off.decode)
        if not why and self._settings.wait_s and self._late[hand_off.decode.name] < MISSES_IN_ROW:
            if await hand_off.heard(self._settings.wait_s):
                return
            self._late[hand_off.decode.name] += 1
        hand_off.noted["hand_off"] = "unknown"
        hand_off.noted["hand_off_reason"] = why or f"no report within hand_off.wait_s ({self._settings.wait_s:g} s)"

    def nothing(self, hand_off: HandOff, why: str) -> None:
        """Prefill answered, but has nothing to hand over."""
        hand_off.decide(HandoffEnd("failed", NO_HANDOVER, why))

    def refused(self, hand_off: HandOff, why: str) -> None:
        """Prefill refused a request that decode has answered. The attempt may already be over."""
        hand_off.decide(HandoffEnd("failed", REFUSED, why))
        if hand_off.transfer_id not in self._live and hand_off.verdict is not None:
            self._count(hand_off, hand_off.verdict)

    def end(self, hand_off: HandOff, answered: bool) -> None:
        """The attempt is over; ``answered``: decode served the request."""
        if self._live.pop(hand_off.transfer_id, None) is None:
            return
        if hand_off.verdict is not None:
            self._count(hand_off, hand_off.verdict)
        elif answered:  # else it was abandoned before it had an outcome
            self._count(hand_off, HandoffEnd("unknown"))

    def _count(self, hand_off: HandOff, verdict: HandoffEnd) -> None:
        self._metrics.hand_offs.add(verdict.became, verdict.code)
        if verdict.became == "handed_over":
            self._metrics.hand_off_links.add(verdict.link)
            self._metrics.hand_off_bytes.add(verdict.link, by=verdict.nbytes)
            self._metrics.hand_off_exposed.observe(verdict.exposed_s, verdict.link)
        self._judge(hand_off, verdict)

    # -- pairs ---------------------------------------------------------------------------------------------------

    def _judge(self, hand_off: HandOff, verdict: HandoffEnd) -> None:
        if verdict.became in ("held", "unknown") or verdict.code in _LEFT:
            return
        names = (hand_off.prefill, hand_off.decode.name)
        pair = self._pairs.setdefault(names, _Pair())
        self._pairs.move_to_end(names)
        while len(self._pairs) > MAX_PAIRS:
            self._pairs.popitem(last=False)
        pair.last = verdict
        if verdict.became == "handed_over":
            if pair.failing:
                log.warning("hand-offs from prefill server %s to decode server %s work again", *names)
            pair.missed, pair.failing, pair.warned_at = 0, False, None
            return
        pair.missed += 1
        now = asyncio.get_running_loop().time()
        if pair.missed < self._settings.warn_after or (
            pair.warned_at is not None and now < pair.warned_at + WARN_EVERY_S
        ):
            return
        pair.failing, pair.warned_at = True, now
        remedy = _REMEDIES.get(verdict.code, "see /pd/traces and the workers' logs")
        log.warning(
            "prefill server %s and decode server %s: none of the last %d requests was handed over%s (%s: %s); %s",
            *names, pair.missed, "" if verdict.code == REFUSED else ", so each prompt is computed twice",
            verdict.code, verdict.reason, remedy,
        )  # fmt: skip

    def disaggregates(self, fleet: Fleet) -> tuple[bool | None, Reason | None]:
        """Whether prompts are handed over now, and if not, why. None: not known yet."""
        prefill = [one for one in fleet.prefill if one.healthy]
        decode = [one for one in fleet.decode if one.healthy]
        for role, servers in (("prefill", prefill), ("decode", decode)):
            if not servers:
                return False, Reason(f"no_{role}", f"no {role} server is healthy")
            if all(one.unfit for one in servers):
                return False, Reason(UNFIT[role], f"{role} server {servers[0].name} {servers[0].unfit}")
        pairs = [self._pairs.get((p.name, d.name)) for p in prefill for d in decode]
        known = [pair for pair in pairs if pair is not None]
        if any(pair.last is not None and pair.last.became == "handed_over" for pair in known):
            return True, None
        for pair in known:
            if pair.failing and pair.last is not None:
                return False, Reason(pair.last.code, f"{pair.last.code}: {pair.last.reason}")
        return None, Reason("untried", "no prompt has been handed over yet")

    def failing(self) -> Iterable[tuple[tuple[str, str], int]]:
        """Pairs whose hand-offs fail, with the number of failed requests in a row."""
        return [(names, pair.missed) for names, pair in self._pairs.items() if pair.failing]

    def describe(self, limit: int) -> list[dict[str, Any]]:
        """State of the most recently used pairs, as JSON."""
        newest = list(reversed(self._pairs.items()))[:limit]
        return [
            {
                "prefill": prefill,
                "decode": decode,
                "missed_in_row": pair.missed,
                "last": pair.last.became if pair.last else None,
                "code": (pair.last.code or None) if pair.last else None,
                "reason": (pair.last.reason or None) if pair.last else None,
                "link": (pair.last.link or None) if pair.last else None,
                "rate_bytes_s": round(pair.last.nbytes / pair.last.taken_s)
                if pair.last and pair.last.taken_s
                else None,
            }
            for (prefill, decode), pair in newest
        ]
