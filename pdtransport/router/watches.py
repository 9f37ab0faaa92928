"""Subscribes to decode servers' workers, which report the end of every transfer at once."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Protocol

import zmq

from pdtransport.control import curve
from pdtransport.control.limits import WATCH_AGAIN_S
from pdtransport.control.sockets import Socket
from pdtransport.control.watching import CannotWatch, WorkerWatch
from pdtransport.protocol.messages import PROTOCOL_VERSION, Ended, Message, Refused, Watching
from pdtransport.router.endpoints import Endpoint
from pdtransport.router.facts import ControlAddress
from pdtransport.settings import ControlSettings

log = logging.getLogger("pdtransport.router")

MAX_WATCHED = 512  # workers; those of later servers are not watched
FRAMES_A_TURN = 256
SILENT_S = 3 * WATCH_AGAIN_S  # a watch without an answer for this long counts as broken
FIRST_ANSWER_S = 2.0  # longest wait for all first answers when the router starts


class Subscription(Protocol):
    """Receiver of the reports.

    ``ranks`` is the number of ranks of the engine of ``decode`` that took the transfer; ``rank`` is one of them.
    """

    def hear(self, decode: Endpoint, rank: int, ranks: int, ended: Ended) -> None: ...


@dataclass(eq=False)
class _Rank:
    """One worker."""

    watch: WorkerWatch
    where: str
    rank: int
    opened_at: float
    heard_at: float | None = None
    complained: bool = False


@dataclass(eq=False)
class _Engine:
    """One engine of a decode server."""

    address: ControlAddress
    ranks: dict[int, _Rank] = field(default_factory=dict)
    world: int = 1
    problem: str = ""


class Watches:
    """Keeps one watch per worker, in the event loop: a reader on each socket's descriptor, and one timer for all."""

    def __init__(self, settings: ControlSettings, listening: Subscription) -> None:
        self._settings = settings
        self._keys = curve.load_keys(settings)
        self._listening = listening
        self._engines: dict[Endpoint, list[_Engine]] = {}
        self._context: zmq.Context[Socket] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._answered = asyncio.Event()

    def follow(self, decode: Endpoint) -> None:
        """Watch the workers of this decode server at the addresses known now."""
        wanted = decode.watchable
        if not wanted or [engine.address for engine in self._engines.get(decode, ())] == list(wanted):
            return
        for engine in self._engines.pop(decode, ()):
            self._drop(engine)
        self._engines[decode] = [self._open(decode, address) for address in wanted]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WATCH_AGAIN_S, self._beat)

    def stands(self, decode: Endpoint) -> bool:
        """True if every worker of the server would report."""
        return not self.why_not(decode)

    def why_not(self, decode: Endpoint) -> str:
        """Why the outcome of this server's transfers is not known; empty if it is."""
        engines = self._engines.get(decode)
        if not engines:
            return "its control address is unknown: its /metrics lack it, and control_host is not set"
        now = asyncio.get_running_loop().time()
        for engine in engines:
            if engine.problem:
                return engine.problem
            for rank in range(engine.world):
                one = engine.ranks.get(rank)
                if one is None or one.heard_at is None or now > one.heard_at + SILENT_S:
                    return f"its worker at {engine.address.host}:{engine.address.port + rank} does not answer"
        return ""

    async def first_answers(self) -> None:
        """Wait until all watches that were just opened are answered, at most ``FIRST_ANSWER_S``."""
        until = asyncio.get_running_loop().time() + FIRST_ANSWER_S
        while self._awaits_any():
            self._answered.clear()
            try:
                await asyncio.wait_for(self._answered.wait(), until - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                return

    def _awaits_any(self) -> bool:
        return any(
            decode.healthy and self.why_not(decode) and not any(engine.problem for engine in engines)
            for decode, engines in self._engines.items()
        )

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for engines in self._engines.values():
            for engine in engines:
                self._drop(engine)
        self._engines.clear()
        if self._context is not None:
            self._context.destroy(0)
            self._context = None

    # -- sockets -------------------------------------------------------------------------------------------------

    def _open(self, decode: Endpoint, address: ControlAddress) -> _Engine:
        engine = _Engine(address, world=address.tp_size)
        for rank in range(address.tp_size):
            self._add(decode, engine, rank)
        return engine

    def _add(self, decode: Endpoint, engine: _Engine, rank: int) -> None:
        host, port = engine.address.host, engine.address.port + rank
        if self._watched() >= MAX_WATCHED:
            self._give_up(decode, engine, f"{MAX_WATCHED} workers are watched already")
            return
        if self._context is None:
            self._context = zmq.Context(1)
            self._context.set(zmq.MAX_SOCKETS, MAX_WATCHED + 16)
        try:
            watch = WorkerWatch(self._context, host, port, self._settings, self._keys)
        except CannotWatch as error:
            self._give_up(decode, engine, str(error))
            return
        loop = asyncio.get_running_loop()
        one = engine.ranks[rank] = _Rank(watch, f"{host}:{port}", rank, loop.time())
        loop.add_reader(watch.descriptor, self._readable, decode, engine, one)
        watch.ask()
        loop.call_soon(self._readable, decode, engine, one)

    def _watched(self) -> int:
        return sum(len(engine.ranks) for engines in self._engines.values() for engine in engines)

    def _drop(self, engine: _Engine) -> None:
        for one in engine.ranks.values():
            asyncio.get_running_loop().remove_reader(one.watch.descriptor)
            one.watch.close()
        engine.ranks.clear()

    def _give_up(self, decode: Endpoint, engine: _Engine, why: str) -> None:
        if not engine.problem:
            engine.problem = why
            log.warning("outcomes of hand-offs to decode server %s are unknown: %s", decode.name, why)

    # -- what arrives, and time ------------------------------------------------------------------------------------

    def _readable(self, decode: Endpoint, engine: _Engine, one: _Rank) -> None:
        if engine.ranks.get(one.rank) is not one:
            return  # closed in the meantime
        messages, more = one.watch.read(FRAMES_A_TURN)
        for message in messages:
            if isinstance(message, Ended):
                self._listening.hear(decode, one.rank, engine.world, message)
            else:
                self._on_answer(decode, engine, one, message)
        if more:
            asyncio.get_running_loop().call_soon(self._readable, decode, engine, one)

    def _on_answer(self, decode: Endpoint, engine: _Engine, one: _Rank, message: Message) -> None:
        if isinstance(message, Watching):
            if message.rank != one.rank:
                self._give_up(decode, engine, f"{one.where} is rank {message.rank}, not {one.rank}: check control_port")
                return
            one.heard_at = asyncio.get_running_loop().time()
            for rank in range(engine.world, min(message.world, MAX_WATCHED)):
                engine.world = rank + 1
                self._add(decode, engine, rank)
            self._answered.set()
        elif isinstance(message, Refused) and not one.complained:
            one.complained = True
            log.warning("decode server %s can't be watched at %s: %s", decode.name, one.where, message.reason)

    def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(WATCH_AGAIN_S, self._beat)
        for decode, engines in self._engines.items():
            for engine in engines:
                for one in list(engine.ranks.values()):
                    self._complain(decode, one, loop.time())
                    one.watch.ask()
                    self._readable(decode, engine, one)

    def _complain(self, decode: Endpoint, one: _Rank, now: float) -> None:
        if one.heard_at is not None or one.complained or now < one.opened_at + SILENT_S or not decode.healthy:
            return
        one.complained = True
        version = one.watch.foreign
        why = (
            f"it uses protocol version {version}, the router {PROTOCOL_VERSION}: run the same pdtransport on both"
            if version is not None
            else "it does not answer: check control.host and control.port of the server, and curve_*_key_file here"
        )
        log.warning(
            "outcomes of hand-offs to decode server %s are unknown: its worker at %s "
            "can't be watched: %s", decode.name, one.where, why,
        )  # fmt: skip
