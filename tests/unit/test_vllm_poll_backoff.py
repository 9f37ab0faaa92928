"""vLLM's message readers that do not spin: they still hear of every message soon."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pdtransport.settings import Settings

pytest.importorskip("vllm")

from pdtransport.vllm.patches.poll_backoff import shorten_spins

WAITED_S = 0.2  # before the message comes
RECHECK_S = 5.0  # vLLM's own, after which a reader looks that heard nothing


@pytest.fixture
def queue() -> tuple[Any, Any]:
    """A writer and a reader of vLLM's, as engine and worker have them."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    writer = MessageQueue(1, 1, max_chunk_bytes=1 << 16)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=reader.wait_until_ready)
    ready.start()
    writer.wait_until_ready()
    ready.join()
    return writer, reader


def receive(writer: Any, reader: Any) -> float:
    """Seconds that the reader waited, in a thread, for a message that was written after ``WAITED_S``."""
    heard: list[float] = []
    started = time.monotonic()

    def read() -> None:
        assert reader.dequeue(timeout=60) == "step"
        heard.append(time.monotonic() - started)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(WAITED_S)
    writer.enqueue("step")
    thread.join()
    return heard[0]


def test_a_message_whose_notification_was_lost_is_read_soon(queue: tuple[Any, Any]) -> None:
    """A notification may be lost (a ZeroMQ socket that keeps the last message only drops one that comes while it is
    looked at): the reader looks by itself, long before vLLM's five seconds."""
    writer, reader = queue
    assert shorten_spins(Settings(spin_s=0.001)) >= 1
    writer._spin_condition.notify = lambda: None
    assert receive(writer, reader) < RECHECK_S / 2


def test_readers_sleep_longer_the_longer_they_wait(queue: tuple[Any, Any]) -> None:
    """An idle engine's readers hardly wake up: a few dozen times in vLLM's five seconds, not once a millisecond."""
    writer, reader = queue
    shorten_spins(Settings(spin_s=0.001))
    looks: list[int] = []
    inner = reader._spin_condition.poller._poller

    class Counting:
        def poll(self, timeout: int) -> Any:
            looks.append(timeout)
            return inner.poll(timeout)

    reader._spin_condition.poller._poller = Counting()
    receive(writer, reader)
    assert 1 < len(looks) < 50
    assert looks == sorted(looks)
