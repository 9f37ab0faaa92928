"""Timestamps of each step of recent transfers, for drawing a request's waterfall."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from pdtransport.observe.status import TransferStatus


@dataclass
class TransferRecord:
    """One transfer on one worker. ``events`` maps a step to a wall-clock second (see :meth:`mark`)."""

    transfer: str
    role: str
    peer: str = ""
    state: str = "open"
    code: str = ""
    reason: str = ""
    blocks: int = 0
    skipped_blocks: int = 0
    bytes: int = 0
    link: str = ""
    events: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = field(default=time.time, repr=False)

    def mark(self, event: str, latest: bool = False) -> None:
        """Record that ``event`` happens now. The first call per event counts; with ``latest``, the last one."""
        if latest or event not in self.events:
            self.events[event] = self.clock()

    def as_dict(self) -> TransferStatus:
        return {
            "transfer": self.transfer,
            "role": self.role,
            "peer": self.peer,
            "state": self.state,
            "code": self.code,
            "reason": self.reason,
            "blocks": self.blocks,
            "skipped_blocks": self.skipped_blocks,
            "bytes": self.bytes,
            "link": self.link,
            "events": dict(self.events),
        }


class Timeline:
    """The last ``limit`` transfers of this worker, oldest first. ``clock``: wall-clock seconds."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.time) -> None:
        self._limit = limit
        self._clock = clock
        self._records: OrderedDict[tuple[str, str], TransferRecord] = OrderedDict()

    def open(self, transfer: str, role: str) -> TransferRecord:
        record = self._records[transfer, role] = TransferRecord(transfer, role, clock=self._clock)
        while len(self._records) > self._limit:
            self._records.popitem(last=False)
        return record

    def get(self, transfer: str, role: str) -> TransferRecord | None:
        return self._records.get((transfer, role))

    def records(self, transfer: str = "") -> list[TransferRecord]:
        """Records of ``transfer``; if empty, of all transfers."""
        if not transfer:
            return list(self._records.values())
        found = (self._records.get((transfer, role)) for role in ("producer", "consumer"))
        return [record for record in found if record is not None]
