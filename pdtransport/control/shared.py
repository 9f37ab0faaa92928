"""State and log of a control channel that its parts share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from pdtransport.control.curve import CurveKeys
from pdtransport.control.directory import Directory
from pdtransport.control.events import Identity
from pdtransport.control.owners import Owners
from pdtransport.control.reach import Reach
from pdtransport.control.sockets import Socket
from pdtransport.kv.fingerprint import plain
from pdtransport.settings import ControlSettings
from pdtransport.system.log_limits import LogLimiter

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
    "names_shared",
    "callers_refused",
    "callers_cut",
)


def complaints_about_peers() -> LogLimiter:
    """Warnings about bad input; a kind that persists is logged less and less often."""
    return LogLimiter(logger, 60.0, 600.0)


@dataclass
class ChannelContext:
    settings: ControlSettings
    me: Identity
    keys: CurveKeys | None
    clock: Callable[[], float]
    context: zmq.Context[Socket]
    counters: Counter[str]
    directory: Directory
    reach: Reach
    owners: Owners | None = None  # set if the check of users is the only protection
    complaints: LogLimiter = field(default_factory=complaints_about_peers)

    def on_name(self, where: str, reason: str, now: float) -> None:
        """A peer warns us that another live process uses our name."""
        self.counters["names_shared"] += 1
        self.complaints.warn(f"warning from {where}: {plain(reason, 512)}", "names", now)

    @property
    def beat_s(self) -> float:
        """Interval of heartbeats: at least three within ``liveness_s``."""
        return min(self.settings.heartbeat_s, self.settings.liveness_s / 3)
