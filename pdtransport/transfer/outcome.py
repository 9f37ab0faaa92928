"""How a transfer ended, and telling whoever asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a transfer ended on this worker. ``code`` and ``reason`` are empty if it ended well."""

    transfer: str
    ok: bool
    code: str = ""
    reason: str = ""
    blocks: int = 0
    nbytes: int = 0
    link: str = ""
    first_token: int | None = None  # consumer: the request goes on from this token
    cached_tokens: int | None = None  # consumer: how many of the prompt's tokens prefill need not compute, if it told
    events: dict[str, float] = field(default_factory=dict, repr=False)  # step -> wall-clock second


OnOutcome = Callable[[Outcome], None]
OnPromise = Callable[[], None]  # decode goes on from the first token if it is told which
OnExpected = Callable[[float], None]  # when the last pages are expected: time.monotonic() seconds


def tell(on_end: OnOutcome, outcome: Outcome) -> None:
    """Call back; an error in the caller's code is logged and ends there."""
    try:
        on_end(outcome)
    except Exception:
        logger.exception("error in the callback of transfer %s", outcome.transfer)
