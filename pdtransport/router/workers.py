"""Asks workers over their control channel what they know about a transfer. Used for display only."""

from __future__ import annotations

import asyncio
from typing import Any

from pdtransport.router.endpoints import Endpoint
from pdtransport.settings import ControlSettings


async def worker_status(
    endpoint: Endpoint, transfer: str, timeout_s: float, settings: ControlSettings
) -> dict[str, Any]:
    """``{"ranks": [status or None per rank], "why": None or the reason for a missing status}``; never raises."""
    control = endpoint.control
    if control is None:
        return {
            "ranks": None,
            "why": "its control address is unknown: set control_host and control_port, or send it a request",
        }
    try:
        from pdtransport.control.client import afetch_status
    except ImportError as error:
        return {"ranks": None, "why": f"the control client can't be imported: {error}"}
    asked = [
        afetch_status(control.host, control.port + rank, transfer=transfer, timeout_s=timeout_s, settings=settings)
        for rank in range(control.tp_size)
    ]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    why = f"{type(failed[0]).__name__}: {failed[0]}"[:300] if failed else None
    return {
        "ranks": [None if isinstance(answer, BaseException) else answer for answer in answers],
        "why": why,
    }
