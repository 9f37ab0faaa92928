"""The servers behind the router: their health, their load, and prefill's control address."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pdtransport.router.facts import ControlAddress, EngineFacts, ServerFacts
from pdtransport.router.placement.base import Role, ServerView
from pdtransport.router.settings import EndpointSettings, RouterHealth, RouterSettings

log = logging.getLogger("pdtransport.router")

# How a request failed: no connection, connection broken, too slow, error status, invalid answer.
Failure = Literal["connect", "disconnected", "timeout", "status", "protocol"]
MAX_ERROR_CHARS = 300
_REPLICA = re.compile(r"_dp\d+$")  # what vLLM appends to the engine id of each data-parallel replica


def is_replica(engine_id: str) -> bool:
    """True if the engine id is that of one of several data-parallel replicas."""
    return _REPLICA.search(engine_id) is not None


@dataclass(eq=False)
class Endpoint:
    """One server in one role."""

    role: Role
    settings: EndpointSettings
    healthy: bool = True  # until a check or a request shows otherwise
    last_error: str = ""
    requests: int = 0
    failures: int = 0
    failures_in_row: int = 0
    inflight: int = 0
    inflight_tokens: int = 0
    ejected_until: float = 0.0
    engine_id: str = ""  # without the suffix of a data-parallel replica
    replicated: bool = False  # it has data-parallel replicas: only an answer shows which one served a request
    restarts: int = 0
    learned: ControlAddress | None = None
    facts: ServerFacts | None = None  # read from its metrics; None: not read since it was last lost
    unfit: str = ""  # why no hand-off can succeed with it, as far as known
    # Decode: since it was last lost, its connector has promised to continue from a first token.
    goes_on: bool = False
    check_now: asyncio.Event = field(default_factory=asyncio.Event)
    view: ServerView = field(init=False)  # the view that placement policies get

    def __post_init__(self) -> None:
        self._look()

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def url(self) -> str:
        return self.settings.url

    @property
    def control(self) -> ControlAddress | None:
        """The configured address with the learned number of ranks; else the learned address; else None."""
        host, port = self.settings.control_host, self.settings.control_port
        if host is None or port is None:
            return self.learned
        return ControlAddress(host, port, self.learned.tp_size if self.learned else self.settings.tp_size)

    @property
    def _several(self) -> tuple[EngineFacts, ...]:
        return self.facts.engines if self.facts is not None and len(self.facts.engines) > 1 else ()

    @property
    def watchable(self) -> tuple[ControlAddress, ...]:
        """Control addresses of all its engines, as far as known."""
        if self._several:
            return tuple(engine.control for engine in self._several)
        return (self.control,) if self.control is not None else ()

    def tell(self, facts: ServerFacts, *, others_may: bool) -> None:
        """Remember what its metrics say.

        ``others_may``: connectors other than pdtransport's can hand over too, and do not appear in the metrics.
        """
        self.facts = facts
        unfit = "" if others_may and not facts.engines else facts.unfit_as(self.role)
        if unfit and unfit != self.unfit:
            log.warning("%s server %s %s. No prompt is handed over through it", self.role, self.name, unfit)
        self.unfit = unfit
        if facts.engines:
            self.replicated = len(facts.engines) > 1
            self._identify(facts.engines[0].engine_id)
            self._note_address(facts.engines[0].control)

    def forget(self) -> None:
        """Forget what is known of the process: the next answer may come from a new one."""
        self.learned = self.facts = None

    def begin(self, tokens: int) -> Callable[[], None]:
        """Count a request in; the returned function counts it out, once."""
        self.requests += 1
        self.inflight += 1
        self.inflight_tokens += tokens
        self._look()
        live = [tokens]

        def end() -> None:
            if live:
                self.inflight -= 1
                self.inflight_tokens -= live.pop()
                self._look()

        return end

    def _look(self) -> None:
        requests, tokens = self.inflight, self.inflight_tokens
        self.view = ServerView(self.name, self.url, requests, tokens, tokens if self.role == "prefill" else requests)

    def learn(self, params: dict[str, Any]) -> None:
        """Remember the control address and identity in a prefill answer's kv_transfer_params."""
        host, port = params.get("remote_host"), params.get("remote_port")
        ranks, engine = params.get("tp_size", 1), params.get("remote_engine_id")
        if self.facts is not None and self.facts.engines:
            if not isinstance(engine, str) or any(engine == known.engine_id for known in self.facts.engines):
                return
            self.facts = None  # these facts belong to a process that is gone
        if isinstance(engine, str):
            self.replicated = is_replica(engine)
            self._identify(engine)
        known = self.replicated and self.learned is not None
        if isinstance(host, str) and isinstance(port, int) and isinstance(ranks, int) and not known:
            self._note_address(ControlAddress(host, port, ranks))

    def _identify(self, engine: str) -> None:
        engine = _REPLICA.sub("", engine)
        if engine and engine != self.engine_id:
            if self.engine_id:
                self.restarts += 1
                log.warning("%s server %s restarted: its engine id changed", self.role, self.name)
            self.engine_id = engine

    def _note_address(self, address: ControlAddress) -> None:
        if address != self.learned:
            self.learned = address
            self._tell_mismatch()

    def _tell_mismatch(self) -> None:
        control, learned = self.control, self.learned
        if control and learned and (control.host, control.port) != (learned.host, learned.port):
            log.warning(
                "%s server %s reports its control channel at %s:%d, but the configured %s:%d is used: check "
                "control_host and control_port",
                self.role, self.name, learned.host, learned.port, control.host, control.port,
            )  # fmt: skip

    def succeeded(self) -> None:
        self.failures_in_row = 0
        self.ejected_until = 0.0

    def failed(self, why: str, how: Failure, health: RouterHealth) -> None:
        """Count a failed request, and schedule a check of the server."""
        self.failures += 1
        self.failures_in_row += 1
        if self.failures_in_row >= health.eject_after:
            self.ejected_until = time.monotonic() + health.eject_s
        if how in {"connect", "disconnected"}:
            self.forget()
            self.goes_on = False
        if how == "connect":
            self.set_healthy(False, why)
        self.last_error = why[:MAX_ERROR_CHARS]
        self.check_now.set()

    def set_healthy(self, healthy: bool, why: str = "") -> None:
        if healthy != self.healthy:
            log.warning("%s server %s is %s%s", self.role, self.name, "healthy" if healthy else "unhealthy: ", why)
        if healthy and not self.healthy:
            self.succeeded()
        self.goes_on = self.goes_on and healthy
        self.healthy = healthy
        self.last_error = "" if healthy else why[:MAX_ERROR_CHARS]

    def describe(self) -> dict[str, Any]:
        """State for /pd/status, as JSON."""
        control = self.control
        return {
            "name": self.name,
            "url": self.url,
            "healthy": self.healthy,
            "last_error": self.last_error or None,
            "spared": self.ejected_until > time.monotonic(),
            "requests": self.requests,
            "failures": self.failures,
            "inflight": self.inflight,
            "inflight_tokens": self.inflight_tokens,
            "restarts": self.restarts,
            "control": None if control is None else f"{control.host}:{control.port}",
            "control_from": None if control is None else "learned" if control is self.learned else "settings",
            "tp_size": None if control is None else control.tp_size,
            "unfit": self.unfit or None,
        }


class Fleet:
    """All servers."""

    def __init__(self, settings: RouterSettings) -> None:
        self.prefill = tuple(Endpoint("prefill", endpoint) for endpoint in settings.prefill)
        self.decode = tuple(Endpoint("decode", endpoint) for endpoint in settings.decode)

    @property
    def all(self) -> tuple[Endpoint, ...]:
        return self.prefill + self.decode

    def of(self, role: Role) -> tuple[Endpoint, ...]:
        return self.prefill if role == "prefill" else self.decode


def usable(endpoints: Iterable[Endpoint], without: Iterable[Endpoint] = ()) -> list[Endpoint]:
    """Healthy servers; ejected ones (too many failed requests in a row) only if there is no other."""
    now = time.monotonic()
    healthy = [endpoint for endpoint in endpoints if endpoint.healthy and endpoint not in without]
    return [endpoint for endpoint in healthy if endpoint.ejected_until <= now] or healthy
