"""Lets vLLM's processes sleep between messages on hosts where they share CPU cores with a model.

A vLLM engine and its workers exchange messages through shared memory, and a reader spins for a second before it sleeps.
On a GPU host that saves microseconds on cores that are idle anyway. On a CPU host the models need these cores: a decode
server that only waits for its pages burns a core that prefill could use.
"""

from __future__ import annotations

import gc
import logging
import time
from typing import Any

from pdtransport.settings import Settings

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


def shorten_spins(settings: Settings) -> int:
    """Limit the spinning of this process's message readers to ``settings.spin_s``; return how many were found.

    If the setting is unset, :data:`CPU_SPIN_S` applies on the CPU platform, and nothing changes elsewhere. vLLM has no
    setting for this, so the reader objects are found through the garbage collector; if their class is not as expected,
    nothing is changed.
    """
    from vllm.platforms import current_platform

    seconds = settings.spin_s
    if seconds is None:
        if not current_platform.is_cpu():
            return 0
        seconds = CPU_SPIN_S
    try:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    except ImportError:
        return 0
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
