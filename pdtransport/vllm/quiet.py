"""Lets vLLM's processes sleep between messages on machines where they share cores with a model.

A vLLM engine and its workers talk through shared memory, and whoever waits for a message spins for a second before it
sleeps. On a GPU host that buys microseconds on cores that have nothing else to do. On a CPU host it is taken from the
models: a decode server that only waits for its pages burns a core that prefill could use.
"""

from __future__ import annotations

import gc
import logging
import time
from typing import Any

from pdtransport.settings import Settings

logger = logging.getLogger(__name__)

CPU_SPIN_S = 0.001  # a model step on CPU takes longer than this, a waking-up less than a tenth of it
LOOK_AGAIN = 0.25  # of the time that a reader has waited


class Restless:
    """The poller of a message reader, which looks for its message by itself every now and then.

    vLLM's writers may lose a notification, and its readers then sleep for five seconds. Hardly anyone sees that while
    they spin for a second first; one that does not would hang in every other answer. The intervals grow with the time
    waited: a lost notification costs a quarter of it more, and five idle seconds cost some 40 looks.
    """

    def __init__(self, poller: Any, spin: Any) -> None:
        self._poller, self._spin = poller, spin

    def poll(self, timeout: float | None = None) -> Any:
        """What the poller says within ``timeout`` milliseconds (None: no limit) or the interval, if that is less."""
        interval = max(1, int(1000 * LOOK_AGAIN * (time.monotonic() - self._spin.last_read)))
        return self._poller.poll(interval if timeout is None else min(timeout, interval))


def shorten_spins(settings: Settings) -> int:
    """Let this process' message readers spin for ``settings.spin_s`` at most, and return how many were found.

    Unset, it applies to the CPU platform alone. vLLM offers no setting for it, so the readers are looked up; where
    their class is not as expected, nothing is changed.
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
        if not isinstance(spin.poller, Restless):
            spin.poller = Restless(spin.poller, spin)
    logger.info("%d message readers spin for %s s at most", len(readers), seconds)
    return len(readers)
