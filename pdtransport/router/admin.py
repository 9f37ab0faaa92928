"""/pd/* and /metrics: timelines, state and counters for the router's operators.

They contain no prompt, no answer and no key.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any

from aiohttp import web

from pdtransport.router import metrics as prom
from pdtransport.router.endpoints import Endpoint, Fleet
from pdtransport.router.settings import RouterSettings
from pdtransport.router.traces import Trace, Traces
from pdtransport.router.workers import worker_status
from pdtransport.serving.errors import ApiError
from pdtransport.serving.keys import ApiKeys

MAX_LISTED = 1000  # traces per answer of /pd/traces
_DEFAULT_LISTED = 100
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


def from_loopback(request: web.Request) -> bool:
    """True if the client itself is on this machine (and not behind a proxy that is)."""
    if request.transport is None or any(name in request.headers for name in _FORWARDED):
        return False
    peer = request.transport.get_extra_info("peername")
    try:
        address = ipaddress.ip_address(peer[0])
    except (ValueError, TypeError, IndexError):
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class Admin:
    """The handlers of /pd/*."""

    def __init__(
        self,
        fleet: Fleet,
        traces: Traces,
        settings: RouterSettings,
        state: Callable[[], dict[str, Any]],
        metrics: Callable[[], str],
        keys: ApiKeys,
    ) -> None:
        self._fleet = fleet
        self._traces = traces
        self._settings = settings
        self._state = state
        self._metrics = metrics
        self._keys = keys
        self._own_port = settings.admin_port is not None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/metrics", self.metrics),
            web.get("/pd/status", self.status),
            web.get("/pd/traces", self.recent),
            web.get("/pd/trace/{transfer_id}", self.one),
        ]

    def _check(self, request: web.Request) -> None:
        if self._keys:
            self._keys.check(request)
        elif not self._own_port and not from_loopback(request):
            raise ApiError(
                403, "this path is for clients on the router's own machine: to serve it elsewhere, set admin_port, or "
                "admin_api_key_file",
                kind="permission_error", code="loopback_only",
            )  # fmt: skip

    async def metrics(self, request: web.Request) -> web.Response:
        """The router's counters and histograms, as Prometheus text."""
        self._check(request)
        return web.Response(text=self._metrics(), headers={"Content-Type": prom.CONTENT_TYPE})

    async def recent(self, request: web.Request) -> web.Response:
        """The newest timelines; ``?limit=N`` of them."""
        self._check(request)
        text = request.query.get("limit", str(_DEFAULT_LISTED))
        if not (text.isascii() and text.isdecimal()) or len(text) > 9:
            raise ApiError(400, "limit must be an integer", param="limit", code="bad_limit")
        traces = self._traces.newest(min(int(text), MAX_LISTED))
        return web.json_response({"traces": [trace.as_json() for trace in traces]})

    async def one(self, request: web.Request) -> web.Response:
        """One timeline, with what the workers of both servers know about the same transfer."""
        self._check(request)
        transfer_id = request.match_info["transfer_id"]
        trace = self._traces.get(transfer_id)
        if trace is None:
            raise ApiError(
                404, "no recent request has this transfer_id; raise traces to remember more", code="unknown_transfer"
            )
        answer = trace.as_json()
        answer["workers"] = await self._workers(trace, transfer_id)
        return web.json_response(answer)

    async def _workers(self, trace: Trace, transfer_id: str) -> dict[str, Any]:
        sent = next(one for one in trace.dispatches if one["transfer_id"] == transfer_id)
        named = {"prefill": sent["prefill"], "decode": sent["decode"]}
        found = {
            role: next((one for one in self._fleet.all if one.role == role and one.name == name), None)
            for role, name in named.items()
        }
        asked = {role: endpoint for role, endpoint in found.items() if endpoint is not None and sent["prefill"]}
        return await self._ask(asked, transfer_id)

    async def _ask(self, endpoints: dict[str, Endpoint], transfer_id: str) -> dict[str, Any]:
        seconds, control = self._settings.timeouts.worker_status_s, self._settings.control
        answers = await asyncio.gather(
            *(worker_status(one, transfer_id, seconds, control) for one in endpoints.values())
        )
        return dict(zip(endpoints, answers, strict=True))

    async def status(self, request: web.Request) -> web.Response:
        """The router's state; ``?workers=1`` also asks every worker whose control address is known for its status."""
        self._check(request)
        workers = request.query.get("workers", "0")
        if workers not in {"0", "1"}:
            raise ApiError(400, "workers must be 0 or 1", param="workers", code="bad_workers")
        answer = self._state()
        if workers == "1":
            known = {f"{one.role} {one.name}": one for one in self._fleet.all}
            answer["workers"] = await self._ask(known, "")
        return web.json_response(answer)
