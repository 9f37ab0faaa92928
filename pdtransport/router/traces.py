"""Timelines of recent requests, in a bounded ring."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

from pdtransport.router.call import Reason

# Events of one dispatch: a retry starts without them.
_ANSWERED = ("dispatched", "decode_dispatched", "prefill_response", "decode_first_byte", "first_token")
MAX_MODEL_CHARS = 128
MAX_WHY_CHARS = 300


class Trace:
    """Timeline of one request. Events are seconds since its arrival; events of a retry replace earlier ones."""

    def __init__(self, api: str) -> None:
        self._arrived = time.perf_counter()
        self.at = time.time()  # arrival in unix seconds, to compare with the workers' events
        self.api = api
        self.model = ""
        self.stream = False
        self.prompt_tokens = 0
        self.prompt_bytes = 0
        self.events: dict[str, float] = {}
        self.dispatches: list[dict[str, Any]] = []
        self.path = ""
        self.decode_only_reason: Reason | None = None
        self.first_token_from: str | None = None  # "prefill" or "decode", once known
        self.why_first_token: str | None = None  # code that says why decode samples it
        self.note: str | None = None
        self.outcome = "running"
        self.status: int | None = None

    def elapsed(self) -> float:
        return time.perf_counter() - self._arrived

    def mark(self, event: str) -> None:
        self.events[event] = self.elapsed()

    def dispatch(self, transfer_id: str, order: str, why_order: str, prefill: str | None, decode: str) -> None:
        """Begin a new dispatch; its events are not known yet.

        A dispatch that continues from the first token keeps the events of the dispatch that gave it out.
        """
        for event in _ANSWERED:
            if order != "continued":
                self.events.pop(event, None)
        self.mark("route")
        self.dispatches.append(
            {
                "transfer_id": transfer_id,
                "order": order,
                "why_order": why_order,
                "prefill": prefill,
                "decode": decode,
                "at": self.events["route"],
                "failure": None,
            }
        )

    def decode_only(self, reason: Reason) -> None:
        """Decode answered by itself after all."""
        self.path, self.decode_only_reason = "decode-only", reason
        self.first_token(None)

    def first_token(self, server: str | None, why: str = "") -> None:
        """Set which server samples this request's first token; ``why`` says why it is decode."""
        self.first_token_from, self.why_first_token = server, why or None

    @property
    def recomputed(self) -> str:
        """Why decode recomputed a prompt that prefill had computed; empty if it did not, as far as known."""
        last = self.dispatches[-1] if self.dispatches else {}
        if self.path != "disaggregated" or last.get("hand_off") != "failed":
            return ""
        return f"{last['hand_off_code']}: {last['hand_off_reason']}"

    def failure(self, why: str) -> None:
        """The last dispatch failed."""
        self.dispatches[-1]["failure"] = why[:MAX_WHY_CHARS]

    def as_json(self) -> dict[str, Any]:
        last, reason = self.dispatches[-1] if self.dispatches else {}, self.decode_only_reason
        return {
            "transfer_id": last.get("transfer_id"),
            "at": self.at,
            "api": self.api,
            "model": self.model,
            "stream": self.stream,
            "prompt_tokens_estimate": self.prompt_tokens,
            "prompt_bytes": self.prompt_bytes,
            "path": self.path,
            "why_not_disaggregated": reason.text if reason else None,
            "why_code": reason.code if reason else None,
            "first_token_from": self.first_token_from,
            "why_first_token_from_decode": self.why_first_token,
            "dispatch": last.get("order"),
            "prefill": last.get("prefill"),
            "decode": last.get("decode"),
            "hand_off": last.get("hand_off"),
            "handed_over": last.get("handed_over"),
            "hand_off_code": last.get("hand_off_code"),
            "hand_off_reason": last.get("hand_off_reason"),
            "link": last.get("link"),
            "bytes": last.get("bytes"),
            "rate_bytes_s": last.get("rate_bytes_s"),
            "exposed_s": last.get("exposed_s"),
            "outcome": self.outcome,
            "status": self.status,
            "note": self.note,
            "retries": max(len(self.dispatches) - 1, 0),
            "events": {name: round(seconds, 6) for name, seconds in self.events.items()},
            "dispatches": self.dispatches,
        }


class Traces:
    """The last ``bound`` dispatched requests, found by any of their transfer ids."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._recent: OrderedDict[int, Trace] = OrderedDict()
        self._by_transfer: dict[str, Trace] = {}

    def add(self, trace: Trace) -> None:
        """Remember the trace's latest dispatch. The retry settings bound the number of dispatches per trace."""
        if self._bound == 0:
            return
        self._recent[id(trace)] = trace
        self._by_transfer[trace.dispatches[-1]["transfer_id"]] = trace
        while len(self._recent) > self._bound:
            _, oldest = self._recent.popitem(last=False)
            for dispatch in oldest.dispatches:
                self._by_transfer.pop(dispatch["transfer_id"], None)

    def get(self, transfer_id: str) -> Trace | None:
        return self._by_transfer.get(transfer_id)

    def newest(self, limit: int) -> list[Trace]:
        """Up to ``limit`` traces, newest first."""
        traces = reversed(self._recent.values())
        return [trace for trace, _ in zip(traces, range(limit), strict=False)]
