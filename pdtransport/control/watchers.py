"""The connections that watch how transfers end; Watch messages renew their leases. Pure: time is passed in."""

from __future__ import annotations

from typing import Generic, TypeVar

from pdtransport.control.limits import MAX_WATCHERS, WATCH_LEASE_S

Connection = TypeVar("Connection")


class Watchers(Generic[Connection]):
    """At most ``MAX_WATCHERS`` connections. A new one never replaces one whose lease still runs."""

    def __init__(self) -> None:
        self._until: dict[bytes, tuple[float, Connection]] = {}

    def admit(self, name: bytes, connection: Connection, now: float) -> bool:
        """Grant or renew a connection's lease; False if there are too many watchers."""
        if name not in self._until and len(self._until) >= MAX_WATCHERS:
            self._forget_silent(now)
            if len(self._until) >= MAX_WATCHERS:
                return False
        self._until[name] = (now + WATCH_LEASE_S, connection)
        return True

    def get(self, name: bytes) -> Connection | None:
        known = self._until.get(name)
        return known[1] if known is not None else None

    def drop(self, name: bytes) -> None:
        self._until.pop(name, None)

    def any(self, now: float) -> bool:
        if self._until:
            self._forget_silent(now)
        return bool(self._until)

    def all(self, now: float) -> list[Connection]:
        self._forget_silent(now)
        return [connection for _, connection in self._until.values()]

    def _forget_silent(self, now: float) -> None:
        self._until = {name: known for name, known in self._until.items() if now < known[0]}
