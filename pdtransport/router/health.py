"""Periodic health checks of every server.

GET /health is answered by vLLM's HTTP process alone. For GET /pd/engine, pdtransport makes that process ask the engine
(``pdtransport/vllm/patches/engine_probe.py``).
"""

from __future__ import annotations

import asyncio

from aiohttp import ClientConnectorError, ClientError, ClientSession, ClientTimeout

from pdtransport.router.endpoints import Endpoint, Fleet
from pdtransport.router.facts import ServerFacts, ask_facts
from pdtransport.router.settings import RouterHealth
from pdtransport.router.upstream import reason
from pdtransport.router.watches import Watches

ENGINE_PATH = "/pd/engine"
MAX_ASKED = 3  # attempts to read a server's metrics before they count as unknown


class Prober:
    """Keeps ``Endpoint.healthy`` up to date, and reads each server's metrics after it came up.

    Args:
        server_key: key that the servers require; None: none.
        others_may: the servers may have connectors other than pdtransport's.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: RouterHealth,
        session: ClientSession,
        watches: Watches,
        server_key: str | None,
        others_may: bool,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._session = session
        self._watches = watches
        self._headers = {} if server_key is None else {"Authorization": f"Bearer {server_key}"}
        self._others_may = others_may
        self._unanswered: dict[Endpoint, int] = {}
        self._mute: set[Endpoint] = set()  # have no usable /pd/engine, since they came up
        self._silent: set[Endpoint] = set()  # their engines did not answer the last check
        self._asked: dict[Endpoint, int] = {}  # failed attempts to read metrics, since it came up
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Check every server once, then keep checking in the background."""
        await asyncio.gather(*(self.check(endpoint) for endpoint in self._fleet.all))
        await self._watches.first_answers()
        self._tasks = [asyncio.create_task(self._watch(endpoint)) for endpoint in self._fleet.all]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def check(self, endpoint: Endpoint) -> None:
        """One health check."""
        timeout = ClientTimeout(total=self._settings.timeout_s)
        try:
            async with self._session.get(f"{endpoint.url}/health", timeout=timeout, allow_redirects=False) as response:
                status = response.status
        except ClientConnectorError as error:
            self._refused(endpoint, f"can't connect: {reason(error)}")
        except (ClientError, OSError, asyncio.TimeoutError) as error:
            self._unanswered[endpoint] = self._unanswered.get(endpoint, 0) + 1
            if self._unanswered[endpoint] >= self._settings.failures:
                self._refused(endpoint, f"GET /health: {type(error).__name__}")
        else:
            if status == 200:
                self._unanswered[endpoint] = 0
                if why := await self._silence(endpoint):
                    endpoint.set_healthy(False, why)
                    return
                await self._learn(endpoint)
                endpoint.set_healthy(True)
            else:
                self._refused(endpoint, f"GET /health answers {status}")

    async def _silence(self, endpoint: Endpoint) -> str:
        """Why the server's engine counts as stopped; empty if it answers, or if it can't be asked."""
        seconds = self._settings.engine_s
        if not seconds or endpoint in self._mute:
            return ""
        was_silent = endpoint in self._silent
        self._silent.discard(endpoint)
        url, timeout = endpoint.url + ENGINE_PATH, ClientTimeout(total=seconds)
        try:
            async with self._session.get(
                url, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status == 200:
                    return ""
                if response.status != 503:  # another version, or another kind of server
                    self._mute.add(endpoint)
                    return ""
        except asyncio.TimeoutError:
            pass
        except (ClientError, OSError):
            return endpoint.last_error if was_silent else ""  # /health decides whether the server is up
        self._silent.add(endpoint)
        return (
            f"its engine did not answer within health.engine_s ({seconds:g} s): it is stopped, or its steps take longer"
        )

    def _refused(self, endpoint: Endpoint, why: str) -> None:
        self._mute.discard(endpoint)
        self._silent.discard(endpoint)
        endpoint.forget()
        endpoint.set_healthy(False, why)

    async def _learn(self, endpoint: Endpoint) -> None:
        """Read the server's facts if they are not known since it came up, and watch a decode server's workers."""
        if endpoint.facts is None:
            facts = await ask_facts(self._session, endpoint.url, self._headers, self._settings.timeout_s)
            self._asked[endpoint] = 0 if facts is not None else self._asked.get(endpoint, 0) + 1
            if self._asked[endpoint] >= MAX_ASKED:
                facts, self._asked[endpoint] = ServerFacts(), 0
            if facts is not None:
                endpoint.tell(facts, others_may=self._others_may)
        if endpoint.role == "decode":
            self._watches.follow(endpoint)

    async def _watch(self, endpoint: Endpoint) -> None:
        pause = self._settings.interval_s
        while True:
            if endpoint.healthy:
                pause = self._settings.interval_s
                await self._pause(endpoint, pause)
            else:
                if endpoint in self._silent:  # its HTTP server is up and only its engine is silent: don't back off
                    pause = self._settings.interval_s
                await asyncio.sleep(pause)
                pause = min(pause * 2, max(self._settings.backoff_max_s, self._settings.interval_s))
            await self.check(endpoint)

    async def _pause(self, endpoint: Endpoint, seconds: float) -> None:
        """Sleep, but wake early after a failed request there. Checks are at least a tenth of an interval apart."""
        endpoint.check_now.clear()
        waiter = asyncio.ensure_future(endpoint.check_now.wait())
        try:
            await asyncio.sleep(seconds / 10)
            await asyncio.wait({waiter}, timeout=seconds * 0.9)
        finally:
            waiter.cancel()
