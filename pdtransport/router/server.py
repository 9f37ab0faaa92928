"""The router itself: its listening sockets, its routes, and the path of one request."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from contextlib import AsyncExitStack
from typing import Any

from aiohttp import ClientError, ClientTimeout, web

from pdtransport.errors import SettingsError
from pdtransport.router import metrics as prom
from pdtransport.router import openapi
from pdtransport.router.admin import Admin
from pdtransport.router.admission import Admission, Seat
from pdtransport.router.call import PATHS, Call, parse
from pdtransport.router.early import EarlyRelay
from pdtransport.router.endpoints import Fleet, usable
from pdtransport.router.fd_limit import ADMIN_CONNECTIONS, room
from pdtransport.router.first_token import Api
from pdtransport.router.handoffs import HandOffs
from pdtransport.router.health import Prober
from pdtransport.router.hints import AT_ONCE, Hinter
from pdtransport.router.ladder import FallbackPolicy
from pdtransport.router.metrics import Metrics
from pdtransport.router.placer import Placer
from pdtransport.router.relay import PD_HEADERS, Relay, pd_headers
from pdtransport.router.settings import RouterSettings
from pdtransport.router.tenants import Salter, Tenants
from pdtransport.router.traces import MAX_MODEL_CHARS, Trace, Traces
from pdtransport.router.upstream import Upstream, end_to_end, request_headers, session
from pdtransport.router.watches import Watches
from pdtransport.serving.cross_site import CorsRule, HostRule
from pdtransport.serving.errors import SERVER, ApiError, json_errors
from pdtransport.serving.keys import ApiKeys
from pdtransport.serving.listening import Bounds, HttpListener, url_of
from pdtransport.system.hosts import is_loopback

log = logging.getLogger("pdtransport.router")

MAX_MODELS_BYTES = 4 << 20  # limit of a /v1/models answer
MAX_PAIRS_SHOWN = 256  # in /pd/status
_PROBE_CONNECTIONS = 4  # per server, in addition to those that carry requests


class Router:
    """The router. After ``start``, it serves requests at :attr:`url`; ``stop`` ends it.

    Raises:
        SettingsError: a key file or the placement policy can't be used, or a client key is also an admin key.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        clients, admins = settings.client_keys(), settings.admin_keys()
        if {each.key for each in clients} & set(admins):
            raise SettingsError("api_key_file and admin_api_key_file share a key: clients would be administrators")
        self._keys = ApiKeys([each.key for each in clients], "API key")
        self._tenants = Tenants(clients, settings.tenant_secret(), share=settings.share_prefixes)
        self._admin_keys = ApiKeys(admins, "admin key")
        self._server_key = settings.server_key()
        self._pool_secrets = settings.pool_secrets()
        self._drop_authorization = bool(self._keys)  # it holds a key of the router, which the servers must not see
        self.metrics = Metrics()
        self.fleet = Fleet(settings)
        self._placer = Placer(settings.placement, self.metrics)
        self._traces = Traces(settings.traces)
        self._hand_offs = HandOffs(settings.hand_off, self.metrics)
        self._watches = Watches(settings.control, self._hand_offs)
        self._hand_offs.why_not = self._watches.why_not
        self._admission = Admission(settings)
        self._began = time.monotonic()
        self._stopping = False
        self._hinter: Hinter | None = None
        self._stack = AsyncExitStack()
        self._main: HttpListener | None = None
        self._admin: HttpListener | None = None

    @property
    def port(self) -> int:
        """The listening port (after start)."""
        return self._main.port if self._main else self.settings.port

    @property
    def url(self) -> str:
        return url_of(self.settings.host, self.port)

    @property
    def admin_url(self) -> str:
        """Base URL of /pd/* and /metrics."""
        return url_of(self.settings.admin_host, self._admin.port) if self._admin else self.url

    async def start(self) -> None:
        """Check every server once, then listen.

        Raises:
            SettingsError: the router can't listen on an address.
        """
        settings = self.settings
        try:
            http = await self._stack.enter_async_context(session(settings, settings.upstream_connections))
            self._probes = await self._stack.enter_async_context(session(settings, _PROBE_CONNECTIONS))
            self._ladder = FallbackPolicy(
                settings,
                self.fleet,
                self._placer,
                Upstream(settings, http),
                self._traces,
                self.metrics,
                self._hand_offs,
            )
            self._stack.callback(self._watches.close)
            self._stack.callback(self._placer.close)
            if settings.pool_hint.url is not None:
                # Separate connections: a health check must not wait behind a hint.
                hints = await self._stack.enter_async_context(session(settings, AT_ONCE))
                self._hinter = Hinter(settings.pool_hint, *self._pool_secrets, self.fleet, hints, self.metrics)
                self._stack.push_async_callback(self._hinter.stop)
            serial = settings.dispatch == "serial"
            prober = Prober(self.fleet, settings.health, self._probes, self._watches, self._server_key, serial)
            self._stack.push_async_callback(prober.stop)
            await prober.start()
            await self._listen()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop listening, give requests ``timeouts.drain_s`` to finish, then cancel the rest.

        Clients of cancelled requests get the reason. May be called twice.
        """
        self._stopping = True
        await asyncio.gather(*(each.stop() for each in (self._main, self._admin) if each is not None))
        await self._stack.aclose()

    async def _listen(self) -> None:
        settings = self.settings
        size = room(settings)
        admin = Admin(self.fleet, self._traces, settings, self.describe, self._metrics_text, self._admin_keys)
        routes: list[web.RouteDef] = [
            *(web.post(path, self._completions) for path in _with_slash(PATHS["completions"])),
            *(web.post(path, self._chat) for path in _with_slash(PATHS["chat"])),
            *(web.get(path, self._models) for path in _with_slash("/v1/models")),
            *(web.get(path, self._health) for path in _with_slash("/health")),
            *(web.get(path, self._live) for path in _with_slash("/live")),
            self._description(public=True, admin=settings.admin_port is None),
        ]
        if settings.admin_port is None:
            routes += admin.routes()
        else:
            where = (settings.admin_host, settings.admin_port, "admin_port")
            inside = [*admin.routes(), self._description(public=False, admin=True)]
            self._admin = await self._open(*where, inside, min(size, ADMIN_CONNECTIONS))
        self._main = await self._open(settings.host, settings.port, "port", routes, size)
        if not self._keys and not is_loopback(settings.host):
            log.warning("the router listens on %s without requiring a key: set api_key_file", settings.host)
        if settings.admin_port is not None and not self._admin_keys and not is_loopback(settings.admin_host):
            log.warning("/pd/* is served on %s without requiring a key: set admin_api_key_file", settings.admin_host)

    async def _open(self, host: str, port: int, setting: str, routes: list[web.RouteDef], size: int) -> HttpListener:
        app = web.Application(middlewares=[json_errors("router", log)])
        app.add_routes(routes)
        settings, timeouts = self.settings, self.settings.timeouts
        bounds = Bounds(
            client_head_s=timeouts.client_head_s,
            client_body_s=timeouts.client_body_s,
            keep_alive_s=settings.keep_alive_s,
            max_idle_per_client=settings.max_idle_per_client,
            max_header_bytes=settings.max_header_bytes,
            drain_s=timeouts.drain_s,
        )
        cors = CorsRule(settings.allowed_origins, "/v1/", ", ".join(PD_HEADERS)) if setting == "port" else None
        listener = HttpListener(app, bounds, size, HostRule(host, settings.allowed_hosts), cors)
        self._stack.push_async_callback(listener.stop)
        try:
            await listener.start(host, port)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise SettingsError(f"{setting}: can't listen on {host}:{port}: {why}; choose another {setting}") from None
        return listener

    def _description(self, *, public: bool, admin: bool) -> web.RouteDef:
        text = openapi.describe(public=public, admin=admin, keys=bool(self._keys), admin_keys=bool(self._admin_keys))

        async def answer(request: web.Request) -> web.Response:
            return web.json_response(text)

        return web.get("/openapi.json", answer)

    def describe(self) -> dict[str, Any]:
        """State for /pd/status, as JSON."""
        does, why = self._hand_offs.disaggregates(self.fleet)
        return {
            "uptime_s": round(time.monotonic() - self._began, 3),
            "dispatch": self.settings.dispatch,
            "placement": self.settings.placement.policy,
            "inflight": self._admission.inflight,
            "buffered_bytes": self._admission.buffered,
            "affinity_entries": {role: self._placer.entries(role) for role in ("prefill", "decode")},
            "prefill": [endpoint.describe() for endpoint in self.fleet.prefill],
            "decode": [
                {**endpoint.describe(), "not_watched": self._watches.why_not(endpoint) or None}
                for endpoint in self.fleet.decode
            ],
            "disaggregates": does,
            "why_not": None if why is None else why.text,
            "pairs": self._hand_offs.describe(MAX_PAIRS_SHOWN),
        }

    # -- the OpenAI endpoints ---------------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, "completions")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, "chat")

    async def _serve(self, request: web.Request, api: Api) -> web.StreamResponse:
        trace = Trace(api)
        try:
            salter = self._tenants.salter(self._keys.check(request))
            with self._admission.enter() as seat:
                return await self._answer(request, api, trace, seat, salter)
        except ApiError as error:
            trace.outcome = "refused" if not trace.dispatches else "failed" if error.status >= 500 else "client_error"
            trace.status = error.status
            trace.note = error.message[:300]
            if trace.outcome == "refused":
                self.metrics.refused.add(error.code or "other")
            error.headers.update(pd_headers(trace))
            raise
        except (asyncio.CancelledError, ConnectionError):
            trace.outcome = "stopped" if self._stopping else "client_disconnected"
            raise
        except BaseException:
            trace.outcome = "failed"
            raise
        finally:
            self._count(trace)

    async def _answer(
        self, request: web.Request, api: Api, trace: Trace, seat: Seat, salter: Salter | None
    ) -> web.StreamResponse:
        call, headers = await self._read(request, api, trace, seat, salter)
        if self._hinter is not None:
            self._hinter.offer(call, headers)
        attempt = await self._ladder.open(call, headers, trace)
        timeouts = self.settings.timeouts
        if attempt.opened is None:
            return await EarlyRelay(request, attempt, trace, timeouts, call, headers, self._ladder, seat.release).run()
        seat.release()
        try:
            if attempt.hand_off is not None and attempt.opened.response.status < 300:
                await self._hand_offs.wait(attempt.hand_off)
            return await Relay(request, attempt, trace, timeouts).run()
        finally:
            attempt.close()

    async def _read(
        self, request: web.Request, api: Api, trace: Trace, seat: Seat, salter: Salter | None
    ) -> tuple[Call, list[tuple[str, str]]]:
        """Read and parse the request; returns it with the headers to send to servers."""
        raw = await seat.read(request)
        if self._main is not None:
            self._main.body_in(request)
        seat.take()
        trace.mark("received")
        placement = self.settings.placement
        chunks = {"chunk_chars": placement.affinity_chunk_chars, "chunks": placement.affinity_chunks}
        call = parse(raw, api, salter=salter, **chunks)
        trace.model, trace.stream = call.model[:MAX_MODEL_CHARS], call.stream
        trace.prompt_tokens, trace.prompt_bytes = call.prompt_tokens, call.prompt_bytes
        headers = request_headers(request.headers, self._server_key, self._drop_authorization)
        if self.settings.first_token == "auto" and "X-Request-Id" not in request.headers:
            headers.append(("X-Request-Id", secrets.token_hex(16)))  # both servers derive their answers' ids from it
        return call, headers

    def _count(self, trace: Trace) -> None:
        trace.mark("done")
        events, path = trace.events, "recomputed" if trace.recomputed else trace.path or "none"
        self.metrics.requests.add(trace.api, path, trace.outcome)
        reason = trace.decode_only_reason.code if trace.decode_only_reason else ""
        wrong = reason == "prefill_refused" and trace.outcome == "client_error"  # decode refused it as well
        if reason and not wrong:
            self.metrics.decode_only.add(reason)
        if trace.first_token_from is not None:
            self.metrics.first_tokens.add(trace.first_token_from, trace.why_first_token or "")
        if "dispatched" in events and len(trace.dispatches) == 1:
            self.metrics.routing.observe(events["dispatched"] - events["received"], path)
        if "first_token" in events:
            self.metrics.first_token.observe(events["first_token"], path)
        self.metrics.duration.observe(events["done"], path)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._keys.check(request)
        headers = request_headers(request.headers, self._server_key, self._drop_authorization)
        timeout = ClientTimeout(total=self.settings.health.timeout_s)
        for endpoint in usable(self.fleet.decode):
            try:
                async with self._probes.get(
                    f"{endpoint.url}/v1/models", headers=headers, timeout=timeout, allow_redirects=False
                ) as answer:
                    body = await answer.content.read(MAX_MODELS_BYTES)
                    kept = [(k, v) for k, v in end_to_end(answer.headers) if k.lower() == "content-type"]
                    while more := await answer.content.read(MAX_MODELS_BYTES):
                        body += more
                        if len(body) > MAX_MODELS_BYTES:
                            raise ApiError(502, f"decode server {endpoint.name} lists too many models", kind=SERVER)
                    return web.Response(status=answer.status, body=body, headers=dict(kept))
            except (ClientError, OSError, asyncio.TimeoutError):
                continue
        raise ApiError(503, "no decode server answers GET /v1/models", kind=SERVER, code="no_decode_server")

    # -- state ------------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        roles = {
            role: {"healthy": sum(one.healthy for one in self.fleet.of(role)), "of": len(self.fleet.of(role))}
            for role in ("prefill", "decode")
        }
        ready = bool(roles["decode"]["healthy"])
        does, why = self._hand_offs.disaggregates(self.fleet)
        # This path needs no key, so show only the code, which contains no names.
        state = {**roles, "disaggregates": does, "why_not": None if why is None else why.code}
        status = "unavailable" if not ready else "degraded" if does is False else "ok"
        return web.json_response({"status": status, **state}, status=200 if ready else 503)

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def _metrics_text(self) -> str:
        labels = {one: (("role", one.role), ("server", one.name)) for one in self.fleet.all}
        lines = self.metrics.lines()
        lines += prom.gauge("pdrouter_inflight", "Requests in progress.", [((), self._admission.inflight)])
        lines += prom.gauge(
            "pdrouter_buffered_bytes", "Bytes of request bodies held.", [((), self._admission.buffered)]
        )
        for name, text, attribute in (
            ("pdrouter_server_healthy", "1 if the server's last check succeeded.", "healthy"),
            ("pdrouter_server_inflight", "Requests in progress at the server.", "inflight"),
            ("pdrouter_server_inflight_tokens", "Prompt tokens in progress at the server.", "inflight_tokens"),
            ("pdrouter_server_restarts", "Times that a prefill server's engine id changed.", "restarts"),
        ):
            lines += prom.gauge(name, text, [(labels[one], int(getattr(one, attribute))) for one in self.fleet.all])
        watched = [(labels[one], int(self._watches.stands(one))) for one in self.fleet.decode]
        lines += prom.gauge("pdrouter_server_watched", "1 if the server's workers report how transfers end.", watched)
        failing = [((("prefill", p), ("decode", d)), n) for (p, d), n in self._hand_offs.failing()]
        lines += prom.gauge(
            "pdrouter_pair_failing", "Consecutive requests that a pair of servers failed to hand over.", failing
        )
        return "\n".join(lines) + "\n"


def _with_slash(path: str) -> tuple[str, str]:
    """vLLM also accepts a path with a trailing slash (it redirects)."""
    return path, f"{path}/"
