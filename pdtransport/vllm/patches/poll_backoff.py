"""Lets vLLM's processes sleep between messages on hosts where they share CPU cores with a model.

A vLLM engine and its workers exchange messages through shared memory, and a reader spins for a second before it sleeps.
On a GPU host that saves microseconds on cores that are idle anyway. On a CPU host the models need these cores: without
this hook a decode server that only waits for its pages burns a core that prefill could use.
"""

from __future__ import annotations

import gc
import logging
import time
from typing import TYPE_CHECKING, Any

from pdtransport.settings import Settings
from pdtransport.vllm.patches.base import Patch, expect

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

CPU_SPIN_S = 0.001  # shorter than any model step on CPU; a wakeup takes less than a tenth of it
LOOK_AGAIN = 0.25  # poll interval, as a fraction of the time waited so far


class PollBackoff:
    """Wraps a message reader's poller so that it wakes up and checks for a message at growing intervals.

    vLLM's writers can lose a notification, after which a reader sleeps for five seconds. With a second of spinning
    first, that is rarely noticed; with a short spin, every other response would hang. The interval grows with the time
    waited: a lost notification delays the message by at most a quarter of that time, and five idle seconds cost about
    40 checks.
    """

    def __init__(self, poller: Any, spin: Any) -> None:
        self._poller, self._spin = poller, spin

    def poll(self, timeout: float | None = None) -> Any:
        """Poll for ``timeout`` milliseconds (None: no limit), but at most for the current interval."""
        interval = max(1, int(1000 * LOOK_AGAIN * (time.monotonic() - self._spin.last_read)))
        return self._poller.poll(interval if timeout is None else min(timeout, interval))


def _check() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    expect(SpinCondition.__init__, uses=["is_reader", "busy_loop_s", "last_read", "poller"])
    expect(SpinCondition.wait, order=["last_read", "busy_loop_s", "poller", "poll", "timeout"])
    expect(SpinCondition.record_read, uses=["last_read"])


def _unneeded(settings: Settings, config: VllmConfig | None) -> str:
    return "" if _spin_s(settings) is not None else "this is no CPU platform, and spin_s is unset"


def _spin_s(settings: Settings) -> float | None:
    """How long readers may spin; None: as long as vLLM lets them."""
    from vllm.platforms import current_platform

    return CPU_SPIN_S if settings.spin_s is None and current_platform.is_cpu() else settings.spin_s


PATCH = Patch("spin_s", _check, costs="vLLM's processes spin for a second each before they sleep", unneeded=_unneeded)


def shorten_spins(settings: Settings) -> int:
    """Limit the spinning of this process's message readers to ``settings.spin_s``; return how many were found.

    If the setting is unset, :data:`CPU_SPIN_S` applies on the CPU platform, and nothing changes elsewhere. vLLM has no
    setting for this, so the reader objects are found through the garbage collector; if their class is not as expected,
    nothing is changed.
    """
    seconds = _spin_s(settings)
    if not PATCH.allowed(settings) or seconds is None:
        return 0
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    readers = [
        spin
        for spin in gc.get_objects()
        if type(spin) is SpinCondition
        and getattr(spin, "is_reader", False)
        and all(hasattr(spin, name) for name in ("busy_loop_s", "poller", "last_read"))
    ]
    for spin in readers:
        spin.busy_loop_s = min(spin.busy_loop_s, seconds)
        if not isinstance(spin.poller, PollBackoff):
            spin.poller = PollBackoff(spin.poller, spin)
    logger.info("%d message readers spin for %s s at most", len(readers), seconds)
    return len(readers)
