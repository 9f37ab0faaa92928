"""How a transfer ended, and the callbacks of a transfer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a transfer ended on this worker. ``code`` and ``reason`` are empty on success."""

    transfer: str
    ok: bool
    code: str = ""
    reason: str = ""
    blocks: int = 0
    nbytes: int = 0
    link: str = ""
    first_token: int | None = None  # consumer: continue decoding from this token
    never_granted: bool = False  # consumer: it is certain that no grant was sent: nothing was promised
    cached_tokens: int | None = None  # consumer: prompt tokens that prefill found in its caches; None: not reported
    events: dict[str, float] = field(default_factory=dict, repr=False)  # step -> wall-clock second


OnOutcome = Callable[[Outcome], None]
OnPromise = Callable[[], None]  # decode promised to continue from prefill's first token


def tell(on_end: OnOutcome, outcome: Outcome) -> None:
    """Call ``on_end``; log an exception that it raises instead of propagating it."""
    try:
        on_end(outcome)
    except Exception:
        logger.exception("error in the callback of transfer %s", outcome.transfer)
