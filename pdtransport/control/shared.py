"""State and log of a control channel that its parts share."""

from __future__ import annotations

import logging
import math
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


class Complaints:
    """Rate-limited warnings about bad input: per topic the first one, then with growing pauses while it goes on.

    A sender of garbage can neither fill the log nor suppress the warnings of other topics.
    """

    FIRST_S, LONGEST_S = 60.0, 600.0

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}

    def say(self, text: str, now: float, topic: str = "") -> None:
        """Log ``text``, or count it if the topic is paused. ``topic`` must be a constant, never taken from input."""
        said = self._topics.setdefault(topic, _Topic())
        if now < said.at + said.pause_s:
            said.unsaid += 1
            return
        logger.warning("%s%s", text, f" (and {said.unsaid} more like it)" if said.unsaid else "")
        quiet = now >= said.at + 2 * said.pause_s
        said.pause_s = self.FIRST_S if quiet else min(self.LONGEST_S, 2 * said.pause_s)
        said.at, said.unsaid = now, 0


@dataclass
class _Topic:
    at: float = -math.inf
    pause_s: float = 0.0
    unsaid: int = 0


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
    complaints: Complaints = field(default_factory=Complaints)

    def on_name(self, where: str, reason: str, now: float) -> None:
        """A peer warns us that another live process uses our name."""
        self.counters["names_shared"] += 1
        self.complaints.say(f"{where} says: {plain(reason, 512)}", now, "names")

    @property
    def beat_s(self) -> float:
        """Interval of heartbeats: at least three within ``liveness_s``."""
        return min(self.settings.heartbeat_s, self.settings.liveness_s / 3)
