"""Whoever may connect is told how transfers end, within bounds, and nobody waits for a watcher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from pdtransport.control import limits, watchers
from pdtransport.control.channel import MessageReceived
from pdtransport.control.curve import load_keys, make_keys
from pdtransport.control.handshake import told_incarnation
from pdtransport.control.watchers import Watchers
from pdtransport.control.watching import CannotWatch, WorkerWatch
from pdtransport.protocol.messages import Claim, Code, Ended, Message, Refused, Watch, Watching, decode, encode
from pdtransport.settings import ControlSettings
from tests.processes.control_rig import HOST, Bench, Node, Stranger, bench
from tests.processes.test_control import both_up, peer

REPORT = Ended(transfer="t", code=Code.REFUSED, reason="block_size differs", link="", blocks=3)


@pytest.fixture
def rig() -> Iterator[Bench]:
    with bench() as it:
        yield it


class Watcher:
    """A router's side of it, driven by the test."""

    def __init__(self, port: int, host: str = HOST, **settings: Any) -> None:
        made = ControlSettings(**settings)
        self.context: zmq.Context[Any] = zmq.Context()
        try:
            self.watch = WorkerWatch(self.context, host, port, made, load_keys(made))
        except BaseException:
            self.context.term()
            raise
        self.heard: list[Message] = []

    def read(self) -> bool:
        messages, _ = self.watch.read(1000)
        self.heard += messages
        return bool(self.heard)

    def close(self) -> None:
        self.watch.close()
        self.context.term()


@pytest.fixture
def watcher() -> Iterator[Any]:
    with ExitStack() as stack:

        def make(node: Node, rig: Bench, **settings: Any) -> Watcher:
            made = Watcher(node.port, **settings)
            stack.callback(made.close)
            made.watch.ask()
            rig.until(made.read)
            return made

        yield make


def test_a_watcher_is_told_who_the_worker_is_and_how_each_transfer_ends(rig: Bench, watcher: Any) -> None:
    """Promise 5: what became of a transfer leaves the worker when it ends."""
    node = rig.node("d")
    assert not node.channel.watched
    first, second = watcher(node, rig), watcher(node, rig)
    me = Watching(engine="d", rank=0, world=1, incarnation=told_incarnation(node.me.incarnation))
    assert first.heard == second.heard == [me]
    assert node.channel.watched
    node.channel.publish(REPORT)
    for one in (first, second):
        rig.until(lambda one=one: one.read() and one.heard[1:] == [REPORT])


def test_a_watcher_that_no_longer_asks_is_forgotten(rig: Bench, watcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept for the dead; one that asks again in time stays."""
    monkeypatch.setattr(watchers, "WATCH_LEASE_S", 0.4)
    node = rig.node("d")
    silent, asking = watcher(node, rig), watcher(node, rig)
    kept = node.channel._listener._watchers

    asked_at = 0.0

    def silent_is_gone() -> bool:
        nonlocal asked_at
        if time.monotonic() > asked_at + 0.1:
            asked_at = time.monotonic()
            asking.watch.ask()
        return node.channel.watched and len(kept._until) == 1

    rig.until(silent_is_gone)
    node.channel.publish(REPORT)
    rig.until(lambda: asking.read() and REPORT in asking.heard)
    silent.read()
    assert REPORT not in silent.heard
    rig.until(lambda: not node.channel.watched)


def test_a_watcher_that_went_away_costs_one_failed_send(rig: Bench, watcher: Any) -> None:
    node = rig.node("d")
    gone = watcher(node, rig)
    gone.watch.close()

    def forgotten() -> bool:
        node.channel.publish(REPORT)
        return not node.channel.watched

    rig.until(forgotten)


def test_there_is_room_for_so_many_watchers_and_those_who_ask_first_keep_theirs(rig: Bench, watcher: Any) -> None:
    """A flood of strangers who want to watch costs nobody anything: the first watcher stays, peers are served."""
    node, other = rig.node("d"), rig.node("p")
    first = watcher(node, rig)
    strangers = [Stranger(node.port) for _ in range(limits.MAX_WATCHERS + 20)]
    try:
        for stranger in strangers:
            for _ in range(3):
                stranger.send(encode(Watch()))
        answers: dict[int, list[Message]] = {i: [] for i in range(len(strangers))}

        def all_answered() -> bool:
            for i, stranger in enumerate(strangers):
                answers[i] += [decode(frame) for frame in stranger.answers()]
            return all(answers.values())

        rig.until(all_answered)
        kinds = [type(found[0]) for found in answers.values()]
        assert kinds.count(Watching) == limits.MAX_WATCHERS - 1
        refusals = [found[0] for found in answers.values() if isinstance(found[0], Refused)]
        assert len(refusals) == 21
        assert {refusal.field for refusal in refusals} == {"watch"}
        assert node.counters["watchers_refused"] >= 21
        node.channel.publish(REPORT)
        rig.until(lambda: first.read() and REPORT in first.heard)
        both_up(rig, other, node)
        assert other.channel.send(peer(node), Claim(transfer="after-all"))
        rig.until(lambda: MessageReceived(peer(other), Claim(transfer="after-all")) in node.events)
    finally:
        for stranger in strangers:
            stranger.close()


def test_questions_on_one_connection_are_answered_only_so_often(rig: Bench) -> None:
    node = rig.node("d")
    stranger = Stranger(node.port)
    try:
        began = time.monotonic()
        for _ in range(limits.STRANGER_FRAMES):
            stranger.send(encode(Watch()))
        rig.until(lambda: node.counters["frames_in"] >= limits.STRANGER_FRAMES)
        took = time.monotonic() - began
        rig.run(0.1)
        assert 1 <= len(stranger.answers()) <= 2 + took / limits.WATCH_GRAIN_S
    finally:
        stranger.close()


def test_reports_to_one_who_does_not_read_are_dropped_not_queued(rig: Bench) -> None:
    """Promise 4: no memory grows, and the worker never waits."""
    node = rig.node("d")
    stranger = Stranger(node.port, rcvhwm=1)
    try:
        stranger.send(encode(Watch()))
        rig.until(lambda: node.channel.watched)
        report = Ended(transfer="t", reason="x" * 512)
        for _ in range(200_000):
            node.channel.publish(report)
            if node.counters["reports_dropped"]:
                break
        assert node.counters["reports_dropped"] > 0
    finally:
        stranger.close()


def test_watchers_need_a_key_where_keys_are_set(rig: Bench, tmp_path: Path, watcher: Any) -> None:
    """Promise 7: who may ask for the status may watch, and nobody else."""
    keys = {}
    for name in ("ours", "other"):
        public, secret = make_keys(tmp_path / name)
        keys[name] = {"curve_public_key_file": public, "curve_secret_key_file": secret}
    node = rig.node("d", **keys["ours"])
    known = watcher(node, rig, **keys["ours"])
    server_key = (tmp_path / "ours" / "control.public").read_text().strip()
    for settings in ({}, {**keys["other"], "curve_server_key": server_key}):
        unknown = Watcher(node.port, **settings)
        try:
            unknown.watch.ask()
            before = node.counters["refused"] + node.counters["handshakes_failed"]
            rig.until(lambda before=before: node.counters["refused"] + node.counters["handshakes_failed"] > before)
            node.channel.publish(REPORT)
            rig.until(lambda: known.read() and known.heard.pop() == REPORT)
            unknown.read()
            assert unknown.heard == []
        finally:
            unknown.close()


def test_another_machine_is_not_watched_without_keys() -> None:
    with pytest.raises(CannotWatch, match=r"192\.0\.2\.1:7670 is not this machine.*curve_"):
        Watcher(7670, host="192.0.2.1")


def test_questions_do_not_pile_up_while_nobody_answers() -> None:
    silent = Watcher(1)
    try:
        for _ in range(1000):
            silent.watch.ask()  # more than two would block, or be kept for whoever listens there one day
        assert silent.watch.read(10) == ([], False)
    finally:
        silent.close()


def test_a_lease_that_ran_out_makes_room() -> None:
    held: Watchers[int] = Watchers()
    for i in range(limits.MAX_WATCHERS):
        assert held.admit(b"%d" % i, i, 0.0)
    assert not held.admit(b"more", 99, limits.WATCH_LEASE_S - 1)
    assert held.admit(b"0", 0, limits.WATCH_LEASE_S - 1)
    assert held.admit(b"more", 99, limits.WATCH_LEASE_S)
    assert held.all(limits.WATCH_LEASE_S) == [0, 99]
    held.drop(b"more")
    assert held.get(b"more") is None
    assert held.get(b"0") == 0
