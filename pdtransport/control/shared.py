"""What the parts of one channel share."""

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
    """Logs what arrives wrong: of each topic the first, then ever more seldom while it goes on. Who sends garbage must
    not fill the log, nor hide what else there is to say."""

    FIRST_S, LONGEST_S = 60.0, 600.0

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}

    def say(self, text: str, now: float, topic: str = "") -> None:
        """``topic``: one of few words of the caller's, never of a sender's."""
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
    owners: Owners | None = None  # where nothing but the user says who may come
    complaints: Complaints = field(default_factory=Complaints)

    def on_name(self, where: str, reason: str, now: float) -> None:
        """A peer tells us that somebody else has our name."""
        self.counters["names_shared"] += 1
        self.complaints.say(f"{where} says: {plain(reason, 512)}", now, "names")

    @property
    def beat_s(self) -> float:
        """Interval of heartbeats: several must fit into the time after which silence counts as death."""
        return min(self.settings.heartbeat_s, self.settings.liveness_s / 3)
