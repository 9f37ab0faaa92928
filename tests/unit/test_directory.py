"""The directory of peers: up and down in order, each given up in time, and nobody's stale state trusted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pdtransport.control import handshake, limits
from pdtransport.control.directory import Directory, Route, Sent
from pdtransport.control.events import Address, Event, Identity, NameShared, PeerDown, PeerId, PeerUp
from pdtransport.control.status import Allowance
from pdtransport.protocol.messages import Hello, Refused, decode

HERE = Address("h", 1)
LIVENESS_S = 5.0


class Wire(Route):
    """A route that keeps what was sent over it."""

    def __init__(self, inbound: bool = False, answer: Sent = Sent.OK) -> None:
        self.inbound = inbound
        self.answer = answer
        self.sent: list[bytes] = []
        self.unbound: list[bool] = []

    def send(self, frame: bytes) -> Sent:
        if self.answer is Sent.OK:
            self.sent.append(frame)
        return self.answer

    def unbind(self, *, silent: bool) -> None:
        self.unbound.append(silent)


@pytest.fixture
def directory() -> Directory:
    return Directory(LIVENESS_S, Counter())


def hello(engine: str = "p", incarnation: int = 1, rank: int = 0, breaks: int = 0) -> Hello:
    return handshake.facts(Hello, Identity(engine, rank, rank + 1, incarnation, {}, {"ucx": b"x"}), breaks)


def kinds(events: list[Event]) -> list[tuple[type, Any]]:
    return [(type(event), event.peer.incarnation) for event in events if isinstance(event, PeerUp | PeerDown)]


P1 = PeerId("p", 0, 1)


def test_a_handshake_repeated_on_any_connection_is_no_news(directory: Directory) -> None:
    wire = Wire()
    assert kinds(directory.admit(hello(), "h", wire, HERE, 0.0)) == [(PeerUp, 1)]
    assert directory.admit(hello(), "h", wire, HERE, 1.0) == []
    assert directory.admit(hello(), "h", Wire(inbound=True), None, 2.0) == []


def test_silence_ends_a_peer_when_its_last_connection_is_silent(directory: Directory) -> None:
    one, other = Wire(), Wire(inbound=True)
    directory.admit(hello(), "h", one, HERE, 0.0)
    directory.admit(hello(), "h", other, None, 3.0)
    assert directory.next_deadline() == LIVENESS_S
    assert directory.tick(LIVENESS_S - 0.01) == []
    assert directory.tick(LIVENESS_S) == []
    assert (one.unbound, one.peer, other.unbound) == ([True], None, [])
    other.last_heard = 7.0
    assert directory.tick(11.9) == []
    assert directory.tick(12.0) == [PeerDown(P1, "silent for 5 s", ended=False)]
    assert directory.next_deadline() is None
    assert not directory.send(P1, b"x")


def test_a_broken_connection_has_until_its_limit_and_resumes_without_a_word(directory: Directory) -> None:
    wire = Wire()
    directory.admit(hello(), "h", wire, HERE, 0.0)
    wire.broken_until = 1.0
    assert not directory.send(P1, b"x")
    assert directory.tick(0.9) == []
    assert directory.admit(hello(), "h", wire, HERE, 0.95) == []
    assert directory.send(P1, b"x")
    assert directory.tick(1.5) == []
    wire.broken_until = 2.0
    assert directory.tick(2.0) == [PeerDown(P1, "connection lost")]


def test_an_inbound_connection_that_broke_is_replaced_by_the_next(directory: Directory) -> None:
    first, second = Wire(inbound=True), Wire(inbound=True)
    directory.admit(hello(), "h", first, None, 0.0)
    first.broken_until = 2.0
    assert directory.admit(hello(), "h", second, None, 1.0) == []
    assert directory.send(P1, b"x")
    assert second.sent == [b"x"]
    assert directory.tick(3.0) == []


def test_a_full_connection_is_not_bypassed_and_a_dead_one_is(directory: Directory) -> None:
    """Another connection would overtake what waits in the queue of the first."""
    first, second = Wire(), Wire()
    directory.admit(hello(), "h", first, HERE, 0.0)
    directory.admit(hello(), "h", second, Address("other", 1), 0.0)
    first.answer = Sent.FULL
    assert not directory.send(P1, b"x")
    first.answer = Sent.GONE
    assert directory.send(P1, b"x")
    assert second.sent == [b"x"]


def test_who_comes_under_a_name_has_no_effect_on_others_of_that_name(directory: Directory) -> None:
    """A restarted worker is served at once, an impostor changes nothing: what was up stays up until its connection
    ends, and may come back whenever it likes."""
    old, new = Wire(), Wire()
    directory.admit(hello(), "h", old, HERE, 0.0)
    assert kinds(directory.admit(hello(incarnation=2), "h", new, HERE, 1.0)) == [(PeerUp, 2)]
    assert old.unbound == []
    assert directory.send(P1, b"to the old")
    assert directory.send(PeerId("p", 0, 2), b"to the new")
    assert (old.sent, new.sent) == ([b"to the old"], [b"to the new"])
    assert directory.leave(old, "gone") == [PeerDown(P1, "gone")]
    assert directory.refusal(hello()) is None
    assert kinds(directory.admit(hello(breaks=0), "h", old, HERE, 2.0)) == [(PeerUp, 1)]


def test_of_two_live_processes_of_one_name_both_are_told_and_named_once(directory: Directory) -> None:
    """Only who is heard after the other came lives: what is left of a process that restarted is no second one."""
    old, new = Wire(), Wire(inbound=True)
    old.where, new.where = "127.0.0.1:7670", "127.0.0.1:40001"
    directory.admit(hello(), "h", old, HERE, 0.0)
    directory.admit(hello(incarnation=2), "h", new, None, 1.0)
    new.last_heard = 2.0
    assert directory.tick(2.0) == []
    assert directory.shared_names == []
    old.last_heard = 2.1
    (event,) = directory.tick(2.1)
    assert isinstance(event, NameShared)
    assert event.peers == (P1, PeerId("p", 0, 2))
    for word in ("p rank 0", "127.0.0.1:7670", "127.0.0.1:40001", "give each instance its own engine_id"):
        assert word in event.reason
    for wire in (old, new):
        (said,) = map(decode, wire.sent)
        assert isinstance(said, Refused)
        assert (said.field, said.reason) == ("name", event.reason)
    assert [[peer.where for peer in peers] for peers in directory.shared_names] == [[old.where, new.where]]
    old.last_heard = new.last_heard = 4.0
    assert directory.tick(4.0) == []
    assert directory.leave(new, "the impostor left") == [PeerDown(PeerId("p", 0, 2), "the impostor left")]
    assert directory.tick(4.1) == []
    assert directory.shared_names == []


def test_a_process_comes_with_one_key(directory: Directory) -> None:
    """Who knows another's incarnation, say because it is a peer of both, can't come as that one with a key of its
    own."""
    wire = Wire()
    wire.key = "one"
    directory.admit(hello(), "h", wire, HERE, 0.0)
    assert directory.refusal(hello(), "one") is None
    refusal = directory.refusal(hello(), "another")
    assert refusal is not None
    assert refusal.field == "incarnation"
    assert directory.refusal(hello(incarnation=2), "another") is None


def test_a_restart_seen_on_the_same_connection_is_down_then_up(directory: Directory) -> None:
    wire = Wire()
    directory.admit(hello(), "h", wire, HERE, 0.0)
    assert kinds(directory.admit(hello(incarnation=2), "h", wire, HERE, 1.0)) == [(PeerDown, 1), (PeerUp, 2)]
    assert wire.peer == PeerId("p", 0, 2)


def test_who_gave_up_says_so_once_and_the_other_side_starts_afresh_once(directory: Directory) -> None:
    """Two directories, as of two processes: whatever is dropped on one side is dropped on the other."""
    ours, theirs = directory, Directory(LIVENESS_S, Counter())
    to_them, to_us = Wire(), Wire(inbound=True)
    us, them = PeerId("us", 0, 8), PeerId("them", 0, 9)
    ours.admit(hello("them", 9), "h", to_them, HERE, 0.0)
    theirs.admit(hello("us", 8), "h", to_us, None, 0.0)
    assert kinds(ours.tick(LIVENESS_S)) == [(PeerDown, 9)]
    # we connect again; they noticed nothing so far
    said = ours.our_breaks(them)
    assert said == 1
    assert kinds(theirs.admit(hello("us", 8, breaks=said), "h", to_us, None, 6.0)) == [(PeerDown, 8), (PeerUp, 8)]
    answer = theirs.our_breaks(us)
    assert kinds(ours.admit(hello("them", 9, breaks=answer), "h", to_them, HERE, 6.0)) == [(PeerUp, 9)]
    # from here on, repeated handshakes are no news on either side
    assert theirs.admit(hello("us", 8, breaks=ours.our_breaks(them)), "h", to_us, None, 7.0) == []
    assert ours.admit(hello("them", 9, breaks=theirs.our_breaks(us)), "h", to_them, HERE, 7.0) == []


def test_an_older_count_of_breaks_changes_nothing(directory: Directory) -> None:
    directory.admit(hello(breaks=2), "h", Wire(), HERE, 0.0)
    assert directory.admit(hello(breaks=1), "h", Wire(), Address("other", 1), 0.0) != []
    assert kinds(directory.admit(hello(breaks=0), "h", Wire(inbound=True), None, 0.0)) == []


def test_the_count_of_breaks_is_not_shown_to_the_transport(directory: Directory) -> None:
    (up,) = directory.admit(hello(breaks=3), "h", Wire(), HERE, 0.0)
    assert isinstance(up, PeerUp)
    assert up.hello.links == {"ucx": b"x"}


def test_our_own_pause_is_forgiven(directory: Directory) -> None:
    silent, broken = Wire(), Wire()
    directory.admit(hello(), "h", silent, HERE, 0.0)
    directory.admit(hello("q"), "h", broken, HERE, 0.0)
    broken.broken_until = 1.0
    directory.forgive(60.0, 60.0)
    assert directory.tick(60.5) == []
    assert [type(event) for event in directory.tick(65.1)] == [PeerDown, PeerDown]


def test_routes_of_a_peer_are_bounded_and_the_quietest_goes(directory: Directory) -> None:
    wires = [Wire(inbound=True) for _ in range(limits.MAX_ROUTES_PER_PEER + 3)]
    for second, wire in enumerate(wires):
        directory.admit(hello(), "h", wire, None, float(second))
    assert [bool(wire.unbound) for wire in wires] == [True] * 3 + [False] * limits.MAX_ROUTES_PER_PEER


def test_what_is_remembered_is_bounded(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdtransport.control.directory.MAX_SHARED_NAMES", 3)
    monkeypatch.setattr("pdtransport.control.directory.MAX_BREAKS", 3)
    for incarnation in range(1, 20):
        for engine in "pq" + "abcdef"[: incarnation % 7]:
            wire = Wire()
            directory.admit(hello(engine, incarnation), "h", wire, HERE, 0.0)
            directory.leave(wire, "why") if incarnation % 2 else None
    assert len(directory._shared) == 3
    assert len(directory._breaks) <= 3


def test_peers_are_bounded_but_a_restart_finds_its_place(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdtransport.control.directory.MAX_PEERS", 1)
    wire = Wire()
    directory.admit(hello(), "h", wire, HERE, 0.0)
    for newcomer in (hello("q"), hello(incarnation=2)):
        refusal = directory.refusal(newcomer)
        assert refusal is not None
        assert refusal.field == "peers"
    wire.broken_until = 1.0
    assert directory.refusal(hello("q")) is not None
    assert directory.refusal(hello(incarnation=2)) is None
    assert kinds(directory.admit(hello(incarnation=2), "h", Wire(), HERE, 0.5)) == [(PeerDown, 1), (PeerUp, 2)]
    assert len(directory) == 1


def test_leaving_one_of_two_connections_keeps_the_peer(directory: Directory) -> None:
    one, other = Wire(), Wire()
    directory.admit(hello(), "h", one, HERE, 0.0)
    directory.admit(hello(), "h", other, Address("other", 1), 0.0)
    assert directory.leave(one, "why") == []
    assert directory.leave(one, "why") == []
    assert directory.leave(other, "why") == [PeerDown(P1, "why")]


def test_an_allowance_is_spent_and_comes_back() -> None:
    allowance = Allowance(3)
    assert [allowance.take(10.0) for _ in range(5)] == [True, True, True, False, False]
    assert [allowance.take(10.4) for _ in range(2)] == [True, False]
    assert [allowance.take(99.0) for _ in range(4)] == [True, True, True, False]
