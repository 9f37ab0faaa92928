"""The pool's HTTP API: the operations of :mod:`pdtransport.pool.admin.pool_admin`, for requests with an API key.

It runs in a thread of its own and uses the pool as an ordinary client, so it can't block the pool's I/O thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from aiohttp import web

from pdtransport.errors import PoolRefusal, PoolUnavailable, SettingsError
from pdtransport.pool.admin.api_requests import ACTIONS, ApiLookup, ApiRequest, MoveWish, PinWish, describe, parse
from pdtransport.pool.admin.pool_admin import AdminError, AdminOutcome, PoolAdmin
from pdtransport.pool.admin.prompts import chunks_of, find, hint
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.messages import TENANT
from pdtransport.pool.settings import DESCRIPTORS, HttpSettings, PoolSettings
from pdtransport.serving.bodies import read_body
from pdtransport.serving.cross_site import CorsRule, HostRule
from pdtransport.serving.errors import SERVER, ApiError, json_errors
from pdtransport.serving.keyfiles import read_lines
from pdtransport.serving.keys import ApiKeys
from pdtransport.serving.listening import Bounds, HttpListener, url_of
from pdtransport.system.descriptors import raise_limit

log = logging.getLogger("pdtransport.pool")

AT_ONCE = 4  # requests that are worked on at once
WAITING = 16  # further requests that may wait
MAX_KEYS_SHOWN = 64  # API keys in the key file
RETRY_AFTER_S = 1
START_S = 30.0
BOUNDS = Bounds(
    client_head_s=10.0,
    client_body_s=30.0,
    keep_alive_s=75.0,
    max_idle_per_client=64,
    max_header_bytes=16384,
    drain_s=2.0,
)
MAX_CONNECTIONS = 128


class PoolApi:
    """Serves the HTTP API until :meth:`close`.

    Raises:
        SettingsError: the key file can't be used, or the API can't listen on the address.
    """

    def __init__(self, settings: PoolSettings, http: HttpSettings) -> None:
        lines = read_lines(http.key_file, "pool.http.key_file")
        if len(lines) > MAX_KEYS_SHOWN:
            raise SettingsError(f"pool.http.key_file: {len(lines)} keys, at most {MAX_KEYS_SHOWN} are allowed")
        self._settings, self._http = settings, http
        self._keys = ApiKeys(lines, "key")
        self._under_way = 0
        self._client = PoolClient(settings.name, settings.dir, who="pdpool --http", threads=1)
        self._workers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="pdpool-http")
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="pdpool-http", daemon=True)
        self._thread.start()
        try:
            self.url = self._started.result(START_S)
        except BaseException:
            self._thread.join(START_S)
            self._end()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(START_S)
        self._end()

    def _end(self) -> None:
        self._client.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[json_errors("pool", log)])
        app.add_routes(self._routes())
        host, port = self._http.address
        hosts, cors = HostRule(host, self._http.allowed_hosts), CorsRule(self._http.allowed_origins, "/pool/")
        self._listener = HttpListener(app, BOUNDS, _connections(), hosts, cors)
        try:
            await self._listener.start(host, port)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            why = os.strerror(number) if number and number > 0 else str(error)
            self._started.set_exception(
                SettingsError(f"pool.http.listen: can't listen on {host}:{port}: {why}; choose another address")
            )
        else:
            self._started.set_result(url_of(host, self._listener.port))
            await self._ended.wait()
        await self._listener.stop()

    # -- routes -----------------------------------------------------------------------------------------------------

    def _routes(self) -> list[web.RouteDef]:
        text = describe()

        async def openapi(_request: web.Request) -> web.Response:
            return web.json_response(text)

        return [
            web.get("/openapi.json", openapi),
            web.get("/health", self._health),
            web.get("/pool/status", self._status),
            web.get("/pool/spaces", self._spaces),
            web.get("/pool/chunks", self._chunks),
            web.post("/pool/lookup", self._lookup),
            web.post("/pool/hint", self._hint),
            *(web.post(f"/pool/{name}", self._action) for name in ACTIONS),
        ]

    async def _health(self, _request: web.Request) -> web.Response:
        try:
            await self._client.lookup(())
        except PoolUnavailable as error:
            raise ApiError(503, str(error), kind=SERVER, code="no_pool") from None
        return web.json_response({"status": "ok"})

    async def _status(self, request: web.Request) -> web.Response:
        return await self._answer(request, PoolAdmin.status)

    async def _spaces(self, request: web.Request) -> web.Response:
        def spaces(admin: PoolAdmin) -> dict[str, Any]:
            return {"spaces": [space.public() for space in admin.spaces()]}

        return await self._answer(request, spaces)

    async def _chunks(self, request: web.Request) -> web.Response:
        self._keys.check(request)
        text, tenant = request.query.get("first", "0"), request.query.get("tenant")
        if not (text.isascii() and text.isdecimal()) or len(text) > 9:
            raise ApiError(400, "first must be an integer", param="first", code="bad_first")
        if tenant is not None and not re.fullmatch(TENANT, tenant):
            raise ApiError(400, "tenant must be a tenant's name", param="tenant", code="bad_tenant")

        def chunks(admin: PoolAdmin) -> dict[str, Any]:
            places, after = admin.some(int(text), tenant)
            return {"chunks": [place.public() for place in places], "next": after}

        return await self._answer(request, chunks)

    async def _lookup(self, request: web.Request) -> web.Response:
        raw = await self._read(request)

        def lookup(admin: PoolAdmin) -> dict[str, Any]:
            return {"found": [found.public() for found in find(admin, parse(raw, ApiLookup).prompt())]}

        return await self._answer(request, lookup)

    async def _hint(self, request: web.Request) -> web.Response:
        raw = await self._read(request)
        return await self._answer(request, lambda admin: _told(hint(admin, parse(raw, ApiLookup).prompt())))

    async def _action(self, request: web.Request) -> web.Response:
        raw = await self._read(request)
        name = request.path.rpartition("/")[2]

        def act(admin: PoolAdmin) -> dict[str, Any]:
            wish = parse(raw, ACTIONS[name][0])
            chosen = wish.chosen()
            return _told(_act(name, wish, admin)(chosen if chosen is not None else chunks_of(admin, wish.prompt())))

        return await self._answer(request, act)

    # -- implementation ---------------------------------------------------------------------------------------------

    async def _read(self, request: web.Request) -> bytes:
        self._keys.check(request)
        limit = (self._http.max_body_bytes, "http-max-body-bytes")
        raw = await read_body(request, limit, (BOUNDS.client_body_s, "the time limit"))
        self._listener.body_in(request)
        return raw

    async def _answer(self, request: web.Request, work: Callable[[PoolAdmin], dict[str, Any]]) -> web.Response:
        """Run ``work`` in a worker thread and answer with its result; stops ``work`` when the client disconnects.

        Raises:
            ApiError: the error to answer with.
        """
        self._keys.check(request)
        if self._under_way >= AT_ONCE + WAITING:
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            raise ApiError(
                503, "too many requests are in progress: try again later", kind=SERVER, code="overloaded", headers=retry
            )
        stop = threading.Event()
        self._under_way += 1
        try:
            told = await asyncio.get_running_loop().run_in_executor(
                self._workers, lambda: json.dumps(work(PoolAdmin(self._client, stop.is_set)))
            )
        except (AdminError, PoolRefusal) as error:
            raise ApiError(409, str(error), code="not_possible") from None
        except PoolUnavailable as error:
            raise ApiError(503, str(error), kind=SERVER, code="no_pool") from None
        finally:
            stop.set()
            self._under_way -= 1
        return web.Response(text=told, content_type="application/json")


def _connections() -> int:
    """How many connections the API may hold: a quarter of the process's file descriptors at most.

    Up to as many again may be open for a moment, accepted only to be closed. So half of the descriptors stay for the
    pool's clients: without one for the next client, libzmq would abort the pool's process.
    """
    return max(1, min(MAX_CONNECTIONS, raise_limit(DESCRIPTORS) // 4))


def _told(outcome: AdminOutcome) -> dict[str, Any]:
    return {"done": outcome.done, "of": outcome.of}


def _act(name: str, wish: ApiRequest, admin: PoolAdmin) -> Callable[[Any], AdminOutcome]:
    if isinstance(wish, PinWish):
        return lambda chosen: admin.pin(chosen, wish.pin, wish.for_s)
    if isinstance(wish, MoveWish):
        return lambda chosen: admin.move(chosen, wish.to)
    actions: dict[str, Callable[[Any], AdminOutcome]] = {
        "unpin": lambda chosen: admin.pin(chosen, "none"),
        "prefetch": admin.prefetch,
        "clear": admin.drop,
        "compress": admin.compress,
    }
    return actions[name]
