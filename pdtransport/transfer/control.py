"""What transfers need of a control channel; :class:`pdtransport.control.channel.ControlChannel` provides it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from pdtransport.control.channel import Event, PeerId
from pdtransport.protocol.messages import Ended, FingerprintValue, Message


class Control(Protocol):
    """Finds and watches peers, and carries messages to and from them. Documented at ``ControlChannel``."""

    counters: Counter[str]

    @property
    def watched(self) -> bool: ...

    @property
    def fingerprint(self) -> Mapping[str, FingerprintValue]: ...

    def connect(self, host: str, port: int) -> None: ...

    def send(self, peer: PeerId, message: Message) -> bool: ...

    def publish(self, report: Ended) -> None: ...

    def change_fingerprint(self, facts: Mapping[str, FingerprintValue], reason: str) -> list[Event]: ...

    def shared_names(self) -> list[tuple[PeerId, list[str]]]: ...

    def sockets(self) -> list[Any]: ...

    def receive(self, now: float) -> list[Event]: ...

    def tick(self, now: float) -> list[Event]: ...

    def next_deadline(self) -> float | None: ...

    def close(self) -> None: ...
