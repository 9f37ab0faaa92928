"""Attacks on the wake-up socket of an engine's scheduler, and on whom its workers call."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdtransport import KVGeometry, Settings, Transport, prompt_digest
from pdtransport.vllm.cache_groups import HandedGroups
from tests.siege.bystander import Effect, idle, processor_s, resident, settled, watched

if TYPE_CHECKING:
    from pdtransport.engine.commands import Command
    from pdtransport.vllm.scheduler import SchedulerSide

FLOOD_S = 1.5
REQUESTS_PER_S = 500
NOBODY = 65534
PROMPT, BLOCK = 256, 32
PAGES = list(range(PROMPT // BLOCK))
DIGEST = prompt_digest(list(range(PROMPT)))
_FLOOD = f"""
import os, socket, sys, time
if sys.argv[2] == "other":
    os.setgid({NOBODY}); os.setuid({NOBODY})
made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
made.setblocking(False)
words = [("", b"!"), ("-words", b"a\\0\\0" + b"x" * 400)]
ends = time.monotonic() + {FLOOD_S}
print("begins", flush=True)
said = 0
while time.monotonic() < ends:
    for suffix, word in words:
        try:
            made.sendto(word, sys.argv[1] + suffix)
            said += 1
        except OSError:
            pass
print(said, flush=True)
"""


def another_user_floods_the_wake_up_socket(folder: Path) -> Effect:
    """Rings and reports of pages, as fast as two processes of another user can send them."""
    return _flood("another user floods the scheduler's wake-up socket", "other" if os.getuid() == 0 else "same")


def this_user_floods_the_wake_up_socket(folder: Path) -> Effect:
    """The same from processes that the kernel lets in: a worker gone mad."""
    return _flood("this user floods the scheduler's wake-up socket", "same")


def _flood(attack: str, who: str) -> Effect:
    from pdtransport.engine.wakeups import WakeupReceiver

    effect, bell, me = Effect(attack), WakeupReceiver(), os.getpid()

    def look() -> None:
        bell.wait(0.001)
        bell.promises()
        bell.arrivals()

    try:
        idle(effect, look)
        effect.memory_before, before = resident(me), processor_s(me)
        command = [sys.executable, "-c", _FLOOD, bell.name, who]
        floods = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for flood in floods:
            assert flood.stdout is not None
            assert flood.stdout.readline() == "begins\n"
        with watched(effect, look, pause_s=0.005):
            said = [int(flood.communicate(timeout=60)[0]) for flood in floods]
        assert all(said) is (who == "same"), "the flood did not reach it" if who == "same" else "another user was heard"
        effect.processor_s = processor_s(me) - before
        effect.memory_after = settled(me, effect.memory_before)
    finally:
        bell.close()
    return effect


def a_client_names_hosts_elsewhere(folder: Path) -> Effect:
    """1,000 requests to decode itself, each with another host to fetch its pages from: addresses, and names that
    somebody would have to look up."""
    hosts = [f"10.{number >> 8}.{number & 255}.1" for number in range(500)]
    hosts += [f"n{number}.example.org" for number in range(500)]
    return _requests("1,000 requests name hosts elsewhere", [(host, 7670, 1) for host in hosts])[0]


def a_client_names_dead_ports(folder: Path) -> Effect:
    """500 requests, each with eight other ports of this machine, where nobody listens."""
    return dead_ports()[0]


def dead_ports() -> tuple[Effect, int]:
    """With how many endpoints decode knew at most."""
    return _requests("500 requests name 4,000 dead ports", [("127.0.3.1", 2000 + 8 * n, 8) for n in range(500)])


def _requests(attack: str, targets: list[tuple[str, int, int]]) -> tuple[Effect, int]:
    """Beside somebody whose prompts are handed over all the time."""
    effect, me, most = Effect(attack), os.getpid(), 0
    with _pair() as (prefill, decode), _scheduler() as side, _log() as effect.lines:

        def hand_over() -> None:
            transfer = secrets.token_hex(16)
            receipt = decode.receive(transfer, DIGEST, PROMPT, PAGES, host=prefill.host, port=prefill.port)
            offer = prefill.offer(transfer, DIGEST, PROMPT)
            offer.ready(PAGES, PROMPT)
            offer.finish()
            receipt.result(30.0)

        # The scheduler is a process of its own in an engine: what it says is made before, and said by and by.
        said = [_ask(side, number, *target) for number, target in enumerate(targets)]
        idle(effect, hand_over)
        effect.memory_before, before = resident(me), processor_s(me)
        with watched(effect, hand_over):
            for number, commands in enumerate(said):
                for command in commands:
                    _do(decode, command)
                if number % 10 == 0:
                    most = max(most, len(decode._engine._control._dialers))
                    time.sleep(10 / REQUESTS_PER_S)
        effect.processor_s = processor_s(me) - before
        effect.memory_after = settled(me, effect.memory_before)
    return effect, most


@contextmanager
def _pair() -> Iterator[tuple[Transport, Transport]]:
    computed = np.random.default_rng(0).integers(0, 256, (4, 64, 8, BLOCK, 128), dtype=np.uint8)
    received = np.zeros_like(computed)
    with (
        Transport(KVGeometry.of_array(computed), port=0) as prefill,
        Transport(KVGeometry.of_array(received), port=0) as decode,
    ):
        yield prefill, decode


@contextmanager
def _scheduler() -> Iterator[SchedulerSide]:
    from pdtransport.vllm.scheduler import SchedulerSide

    side = SchedulerSide(
        Settings(), producer=False, consumer=True, groups=HandedGroups.one(BLOCK), engine="e", port=7, ranks=1, heads=8
    )
    try:
        yield side
    finally:
        side.close()


@contextmanager
def _log() -> Iterator[list[str]]:
    """Lines that the attacked process writes."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep, logger = Keep(logging.WARNING), logging.getLogger("pdtransport")
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)


def _ask(side: SchedulerSide, number: int, host: str, port: int, ranks: int) -> list[Command]:
    """A request arrives, finds room if its pages may come, and one step begins."""
    from tests.unit.test_vllm_scheduler import blocks, request, step

    params = {"do_remote_prefill": True, "transfer_id": f"a{number}", "remote_host": host, "remote_port": port}
    r = request({**params, "tp_size": ranks}, PROMPT, f"r{number}")
    side.on_new_request(r)
    external, _ = side.matched_tokens(r, 0)
    if external:
        side.allocated(r, blocks(*range(20, 28)), external)
    side._awaited.clear()  # nobody waits for these
    commands: list[Command] = step(side).before
    side.finished(r, [])
    return commands + step(side).before


def _do(decode: Transport, command: Command) -> None:
    """As a worker does it."""
    from pdtransport.engine.commands import Decline, SendClaim, StartReceive

    if isinstance(command, StartReceive):
        where: dict[str, Any] = {"host": command.host, "port": command.port, "ranks": command.ranks}
        decode.receive(command.transfer, command.prompt_digest, command.tokens, command.pages, **where)
    elif isinstance(command, SendClaim):
        decode.claim(command.transfer, host=command.host, port=command.port, ranks=command.ranks)
    elif isinstance(command, Decline):
        where = {"host": command.host, "port": command.port, "ranks": command.ranks}
        decode.decline(command.transfer, command.code, command.reason, **where)
