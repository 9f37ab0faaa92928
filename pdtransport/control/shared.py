"""What the parts of one channel share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from pdtransport.control.curve import Keys
from pdtransport.control.directory import Directory
from pdtransport.control.events import Identity
from pdtransport.control.reach import Reach
from pdtransport.control.sockets import Socket
from pdtransport.settings import ControlSettings

logger = logging.getLogger("pdtransport.control")

COUNTERS = (
    "frames_in",
    "frames_out",
    "garbage",
    "dropped_unknown_peer",
    "refused",
    "send_failed",
    "reconnects",
    "handshakes_failed",
    "status_limited",
    "watchers_refused",
    "reports_dropped",
)


class Complaints:
    """Logs what arrives wrong, at most once a second: a peer that sends garbage must not fill the log."""

    EVERY_S = 1.0

    def __init__(self) -> None:
        self._next = 0.0
        self._unsaid = 0

    def say(self, text: str, now: float) -> None:
        if now < self._next:
            self._unsaid += 1
            return
        logger.warning("%s%s", text, f" (and {self._unsaid} more complaints)" if self._unsaid else "")
        self._next, self._unsaid = now + self.EVERY_S, 0


@dataclass
class Shared:
    settings: ControlSettings
    me: Identity
    keys: Keys | None
    clock: Callable[[], float]
    context: zmq.Context[Socket]
    counters: Counter[str]
    directory: Directory
    reach: Reach
    complaints: Complaints = field(default_factory=Complaints)

    @property
    def beat_s(self) -> float:
        """Interval of heartbeats: several must fit into the time after which silence counts as death."""
        return min(self.settings.heartbeat_s, self.settings.liveness_s / 3)
