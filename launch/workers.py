"""Asks the workers of a topology for their status over their control channels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pdtransport.errors import PDTransportError
from pdtransport.settings import ControlSettings

ASK_S = 5.0

Address = tuple[str, int]


class WorkerError(PDTransportError):
    """A worker did not report its status."""


def ask(address: Address, control: ControlSettings, transfer: str = "", timeout_s: float = ASK_S) -> dict[str, Any]:
    """The status of the worker at ``address``; with ``transfer``, of that transfer only.

    Raises:
        WorkerError: no answer; the text says which worker and why.
    """
    from pdtransport.control.client import fetch_status

    host, port = address
    try:
        status: dict[str, Any] = fetch_status(host, port, transfer=transfer, timeout_s=timeout_s, settings=control)
    except (PDTransportError, OSError, ValueError) as error:
        raise WorkerError(f"the worker at {host}:{port} did not report its status: {error}") from None
    return status


def received(statuses: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """KV bytes and pages that these workers received from peers since they started."""
    counters = [status.get("counters", {}) for status in statuses]
    total_bytes = sum(int(one.get("bytes_received", 0)) for one in counters)
    return total_bytes, sum(int(one.get("blocks_received", 0)) for one in counters)


def rate(bytes_per_s: float | None) -> str:
    """``3.2 GB/s``, or ``rate not measured``."""
    if not bytes_per_s:
        return "rate not measured"
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def size(count: int) -> str:
    """``3.2 MB``"""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
