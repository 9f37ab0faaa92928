"""Chooses the server for a request, by the placement policy that the settings name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pdtransport.router.call import Call
from pdtransport.router.endpoints import Endpoint, Role
from pdtransport.router.metrics import Metrics
from pdtransport.router.placement.base import RequestView
from pdtransport.router.placement.least_loaded import LeastLoaded
from pdtransport.router.placement.registry import other_policy
from pdtransport.router.policy_thread import NoChoice, PolicyThread
from pdtransport.router.settings import RouterPlacement
from pdtransport.system.log_limits import LogLimiter

log = logging.getLogger("pdtransport.router")


class Placer:
    """Asks the policy; if another package's policy fails, is late or names no candidate, ``least_loaded`` chooses.

    Raises:
        SettingsError: there is no such policy, or it can't be made.
    """

    def __init__(self, settings: RouterPlacement, metrics: Metrics) -> None:
        self._least_loaded = LeastLoaded(settings)
        other = other_policy(settings)
        self._other = None if other is None else PolicyThread(other)
        self._name = settings.policy
        self._failures = metrics.placement_failures
        self._lines = LogLimiter(log)

    def entries(self, role: Role) -> int:
        return self._least_loaded.entries(role)

    def close(self) -> None:
        if self._other is not None:
            self._other.close()

    async def choose(
        self, role: Role, call: Call, candidates: Sequence[Endpoint], decode: Endpoint | None = None
    ) -> Endpoint | None:
        """One of ``candidates``, or None if there are none.

        Args:
            decode: the chosen decode server, if ``role`` is prefill.
        """
        if not candidates:
            return None
        request = RequestView(
            role,
            decode.name if decode is not None else "",
            call.model,
            call.stream,
            call.prompt_tokens,
            call.prompt_bytes,
            call.prefix_keys,
        )
        servers = tuple(endpoint.view for endpoint in candidates)
        if self._other is not None:
            try:
                return _named(await self._other.choose(request, servers), candidates)
            except NoChoice as error:
                self._failed(error)
        return _named(self._least_loaded.choose(request, servers), candidates)

    def _failed(self, error: NoChoice) -> None:
        self._failures.add(error.reason)
        text = (
            f"placement.policy {self._name} {error}; least_loaded chose instead: fix its package or set another policy"
        )
        if line := self._lines.line(text, error.reason):
            log.warning("%s", line)
        log.debug("placement.policy %s", self._name, exc_info=error)


def _named(name: object, candidates: Sequence[Endpoint]) -> Endpoint:
    if isinstance(name, str):
        for endpoint in candidates:
            if endpoint.view.name == name:
                return endpoint
    what = repr(name[:100]) if isinstance(name, str) else f"a {type(name).__name__}"
    raise NoChoice("unknown_server", f"returned {what}, which is not the name of a candidate server")
