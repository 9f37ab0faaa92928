"""What shall go wrong in one worker process: rules, and the injector that applies them.

An injector counts what passes its *points* and acts on the occurrences that a rule names, so that a seed decides what
happens to which frame or batch (how the processes interleave stays the machine's). :mod:`tests.faults.inject` puts the
points into the real channel and links of a process.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgpack

MAX_RECORDED = 256  # frames that may be replayed
FLUSH_S = 0.005  # lets libzmq's own thread send what was said before a process dies
REORDER_S = 0.05  # a frame that waits for its successor waits no longer

POINTS = ("out", "in", "send", "receive", "placed", "turn")


@dataclass(frozen=True)
class Rule:
    """Act on occurrences ``first .. first + count`` of what passes ``point``.

    Args:
        point: ``out`` (frames that leave), ``in`` (messages that arrive), ``send``, ``receive`` and ``placed`` (batches
            on a link), ``turn`` (turns of the I/O thread).
        kind: the message's kind, or ``any``.
        action: ``kill`` or ``stop`` this process at any point.
            Frames: ``drop``, ``delay``, ``stall`` (all that follow, too), ``duplicate``, ``reorder`` (the next one goes
            first), ``flip`` a bit, ``truncate``, ``replay`` a frame of the past beside it, or a ``foreign`` one.
            Batches sent: ``busy`` and ``error`` of the link, ``flip`` a bit after the checksum, ``truncate`` the offer.
            Batches received: ``delay``, ``stall`` (the whole link), ``error``.
        seconds: of ``delay`` and ``stall``.
        after: act once the thing itself has happened (``kill`` and ``stop`` only).
    """

    point: str
    kind: str
    action: str
    first: int = 0
    count: int = 1
    seconds: float = 0.0
    after: bool = False
    seed: int = 0


@dataclass
class _State:
    rule: Rule
    random: random.Random
    seen: int = 0


@dataclass
class Injector:
    """Applies the rules of one process. Used by its I/O thread alone, but for :meth:`set`."""

    done: Counter[str] = field(default_factory=Counter)  # action -> how often it took effect
    _states: list[_State] = field(default_factory=list)
    _due: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _recorded: list[tuple[str, bytes]] = field(default_factory=list)  # since the rules were set
    _past: list[tuple[str, bytes]] = field(default_factory=list)  # about transfers that are over
    _swapped: dict[int, Callable[[], object]] = field(default_factory=dict)  # connection -> a frame held back
    _held_until: float = 0.0  # frames that leave wait until then
    _still_until: float = 0.0  # links make no progress until then

    def set(self, rules: list[Rule]) -> None:
        """Replace all rules; what is held back goes on its way. What was said until now is of the past: it may be
        replayed."""
        self._past, self._recorded = [*self._past, *self._recorded][-MAX_RECORDED:], []
        self._states = [_State(rule, random.Random(rule.seed)) for rule in rules]
        self._held_until = self._still_until = 0.0
        self._due = [(0.0, order, call) for _, order, call in self._due]
        heapq.heapify(self._due)

    def match(self, point: str, kind: str) -> list[_State]:
        """The rules that act on this occurrence."""
        hits = []
        for state in self._states:
            rule = state.rule
            if rule.point == point and rule.kind in (kind, "any"):
                if rule.first <= state.seen < rule.first + rule.count:
                    hits.append(state)
                state.seen += 1
        return hits

    def uncount(self, point: str, kind: str) -> None:
        """Take the last occurrence back: it came to nothing."""
        for state in self._states:
            if state.rule.point == point and state.rule.kind in (kind, "any"):
                state.seen -= 1

    # -- time ----------------------------------------------------------------------------------------------------

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), call))

    def run_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()

    def next_due(self) -> float | None:
        return self._due[0][0] if self._due else None

    def stall_links(self, seconds: float) -> None:
        """Links make no progress for so long."""
        self._still_until = time.monotonic() + seconds
        self.later(seconds, lambda: None)

    @property
    def still(self) -> bool:
        return self._still_until > time.monotonic()

    # -- processes -----------------------------------------------------------------------------------------------

    def strike(self, states: list[_State], *, after: bool) -> None:
        """Kill or stop this very process, if one of the rules says so."""
        for state in states:
            if state.rule.after is after and state.rule.action in ("kill", "stop"):
                if after:
                    time.sleep(FLUSH_S)
                self.done[state.rule.action] += 1
                os.kill(os.getpid(), signal.SIGKILL if state.rule.action == "kill" else signal.SIGSTOP)

    # -- frames that leave -----------------------------------------------------------------------------------------

    def out(self, connection: int, frame: bytes, send: Callable[[bytes], object], ok: object) -> object:
        """Send ``frame`` over ``connection``, or what the rules make of it. ``ok``: what a sender wants to hear."""
        kind = kind_of(frame)
        states = self.match("out", kind) if self._states else []
        self.strike(states, after=False)
        waiting = self._swapped.pop(connection, None)
        answer = self._out(connection, kind, frame, send, ok, states)
        if waiting is not None:
            waiting()
        if len(self._recorded) < MAX_RECORDED:
            self._recorded.append((kind, frame))
        self.strike(states, after=True)
        return answer

    def _out(
        self,
        connection: int,
        kind: str,
        frame: bytes,
        send: Callable[[bytes], object],
        ok: object,
        states: list[_State],
    ) -> object:
        frames, wait = [frame], max(0.0, self._held_until - time.monotonic())
        swap = False
        for state in states:
            rule, chance = state.rule, state.random
            if rule.action == "drop":
                frames = []
            elif rule.action == "delay":
                wait += rule.seconds * chance.uniform(0.5, 1.5)
            elif rule.action == "stall":
                self._held_until = time.monotonic() + rule.seconds
                wait = max(wait, rule.seconds)
            elif rule.action == "duplicate":
                frames = [*frames, frame]
            elif rule.action == "reorder":
                swap = True
            elif rule.action == "flip":
                frames = [flipped(each, chance) for each in frames]
            elif rule.action == "truncate":
                frames = [each[: chance.randrange(len(each))] for each in frames]
            elif rule.action in ("replay", "foreign"):
                extra = self._old(kind, frame, chance, foreign=rule.action == "foreign")
                if not extra:
                    continue
                frames = [*frames, extra]
            else:
                continue
            self.done[rule.action] += 1
        if swap:
            release = self._swapped[connection] = _once(lambda: _send_all(frames, send))
            self.later(REORDER_S, release)
            return ok
        if wait > 0:
            self.later(wait, lambda: _send_all(frames, send))
            return ok
        answers = [send(each) for each in frames]
        return answers[0] if answers else ok

    def _old(self, kind: str, frame: bytes, chance: random.Random, *, foreign: bool) -> bytes:
        """A recorded frame of this kind about a transfer that is over; ``foreign``: this frame under another
        generation, or with another transfer's name on it."""
        mine = msgpack.unpackb(frame)
        if not isinstance(mine, dict) or "generation" not in mine:
            return b""
        past = [each for other, each in self._past if other == kind]
        if not foreign:
            return chance.choice(past) if past else b""
        forms = [{**mine, "generation": mine["generation"] + step} for step in (1, -1)]
        live = [msgpack.unpackb(each) for other, each in self._recorded if other == kind]
        for each in [*live[-4:], *(msgpack.unpackb(each) for each in past[-4:])]:
            if each["transfer"] != mine["transfer"]:
                forms += [{**each, "transfer": mine["transfer"]}, {**mine, "transfer": each["transfer"]}]
        return msgpack.packb(chance.choice(forms))  # type: ignore[no-any-return]


def kind_of(frame: bytes) -> str:
    return str(msgpack.unpackb(frame)["kind"])


def flipped(frame: bytes, chance: random.Random) -> bytes:
    """One bit of ``frame`` turned over."""
    changed = bytearray(frame)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _send_all(frames: list[bytes], send: Callable[[bytes], object]) -> None:
    for each in frames:
        send(each)


def _once(call: Callable[[], None]) -> Callable[[], None]:
    todo = [call]

    def run() -> None:
        if todo:
            todo.pop()()

    return run
