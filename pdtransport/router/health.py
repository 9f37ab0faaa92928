"""Periodic GET /health of every server."""

from __future__ import annotations

import asyncio

from aiohttp import ClientConnectorError, ClientError, ClientSession, ClientTimeout

from pdtransport.router.endpoints import Endpoint, Fleet
from pdtransport.router.settings import RouterHealth
from pdtransport.router.upstream import reason


class Prober:
    """Keeps ``Endpoint.healthy`` true to what the servers answer."""

    def __init__(self, fleet: Fleet, settings: RouterHealth, session: ClientSession) -> None:
        self._fleet = fleet
        self._settings = settings
        self._session = session
        self._unanswered: dict[Endpoint, int] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Check every server once, then keep checking in the background."""
        await asyncio.gather(*(self.check(endpoint) for endpoint in self._fleet.all))
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
                endpoint.set_healthy(True)
            else:
                self._refused(endpoint, f"GET /health answers {status}")

    def _refused(self, endpoint: Endpoint, why: str) -> None:
        endpoint.learned = None  # whoever answers next may be a new process
        endpoint.set_healthy(False, why)

    async def _watch(self, endpoint: Endpoint) -> None:
        pause = self._settings.interval_s
        while True:
            if endpoint.healthy:
                pause = self._settings.interval_s
                await self._pause(endpoint, pause)
            else:
                await asyncio.sleep(pause)
                pause = min(pause * 2, max(self._settings.backoff_max_s, self._settings.interval_s))
            await self.check(endpoint)

    async def _pause(self, endpoint: Endpoint, seconds: float) -> None:
        """Sleep, but not on after a request failed there. Checks are at least a tenth of an interval apart."""
        endpoint.check_now.clear()
        waiter = asyncio.ensure_future(endpoint.check_now.wait())
        try:
            await asyncio.sleep(seconds / 10)
            await asyncio.wait({waiter}, timeout=seconds * 0.9)
        finally:
            waiter.cancel()
