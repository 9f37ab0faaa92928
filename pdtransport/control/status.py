"""Answers to StatusRequest: limits their rate and their size."""

from __future__ import annotations

import json
from typing import Any

from pdtransport.control.limits import STATUS_PER_S
from pdtransport.protocol.messages import StatusReply, encode

LEFT_OUT = "transfers_left_out"  # key in the status: how many of the oldest transfers did not fit


class Allowance:
    """A token bucket: ``per_s`` a second, with a burst of ``at_once`` (default: ``per_s``)."""

    def __init__(self, per_s: float = STATUS_PER_S, at_once: float | None = None) -> None:
        self._per_s = per_s
        self._most = self._left = per_s if at_once is None else at_once
        self._at = 0.0

    def take(self, now: float) -> bool:
        self._left = min(self._most, self._left + max(0.0, now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def status_frame(text: str, max_bytes: int) -> bytes | None:
    """The encoded reply, without the oldest transfers if it would be longer than ``max_bytes``.

    None if it is too long even without transfers, or ``text`` is not a JSON object with a list of ``transfers``.
    """
    frame = encode(StatusReply(status=text))
    if len(frame) <= max_bytes:
        return frame
    try:
        status = json.loads(text)
    except ValueError:
        return None
    if not isinstance(status, dict) or not isinstance(status.get("transfers"), list):
        return None
    return _fitted(status, max_bytes)


def _fitted(status: dict[str, Any], max_bytes: int) -> bytes | None:
    """The encoded reply with as many of the newest transfers as fit, within a factor of two.

    None if it is too long even without transfers.
    """
    transfers = status["transfers"]
    keep = len(transfers) // 2
    while True:
        newest = transfers[len(transfers) - keep :]
        text = json.dumps({**status, "transfers": newest, LEFT_OUT: len(transfers) - keep})
        frame = encode(StatusReply(status=text))
        if len(frame) <= max_bytes:
            return frame
        if keep == 0:
            return None
        keep //= 2
