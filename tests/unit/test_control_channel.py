"""Control channels over loopback, in one thread: whom they believe, and what becomes of words to a lost peer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import zmq

from pdtransport.control import handshake
from pdtransport.control.channel import MessageReceived, PeerDown, PeerId, PeerUp
from pdtransport.control.events import Identity
from pdtransport.control.limits import (
    MAX_STRANGER_FRAME,
    MAX_WATCHERS,
    STRANGER_FRAMES,
    WATCH_AGAIN_S,
    WATCH_LEASE_S,
)
from pdtransport.control.sockets import Inbox, Letter, Socket
from pdtransport.control.watchers import Watchers
from pdtransport.errors import SettingsError
from pdtransport.protocol.messages import (
    PROTOCOL_VERSION,
    Claim,
    Hello,
    LinkCall,
    Ping,
    Pong,
    Refused,
    Welcome,
    decode,
    encode,
)
from tests.processes.control_rig import FACTS, HOST, Bench, Node, Stranger, bench


@pytest.fixture
def rig() -> Iterator[Bench]:
    with bench() as it:
        yield it


def id_of(node: Node) -> PeerId:
    return PeerId(node.me.engine, node.me.rank, node.me.incarnation)


@pytest.mark.parametrize(("rank", "world", "welcome"), [(0, 1, True), (3, 4, True), (1, 1, False), (5, 4, False)])
def test_a_rank_is_one_of_its_world(rank: int, world: int, welcome: bool) -> None:
    """Ranks count from 0: a peer that is number `world` or above holds no heads, and is refused by the field's name."""
    me = Identity("p", 0, 1, 1, FACTS)
    theirs = handshake.facts(Hello, Identity("d", rank, world, 2, FACTS), 0)
    refusal = handshake.check(me, theirs)
    assert (refusal is None) == welcome
    if refusal is not None:
        assert (refusal.field, refusal.yours) == ("rank", str(rank))
        assert f"reports {world} ranks" in refusal.reason


def test_a_hello_of_another_protocol_version_or_of_our_own_name_is_refused() -> None:
    """By the field's name, with both values: also where everything else fits."""
    me = Identity("p", 0, 1, 1, FACTS)
    fits = handshake.facts(Hello, Identity("d", 0, 1, 2, FACTS), 0)
    assert handshake.check(me, fits) is None
    for change, field, says in (
        ({"protocol": PROTOCOL_VERSION + 1}, "protocol_version", "run the same pdtransport version on both"),
        ({"engine": "p"}, "engine", "give each instance its own engine_id"),
        ({"engine": "p", "incarnation": 1}, "engine", "connected to itself"),
    ):
        refusal = handshake.check(me, fits.model_copy(update=change))
        assert refusal is not None
        assert refusal.field == field
        assert says in refusal.reason
    assert handshake.check(me, fits.model_copy(update={"engine": "p", "rank": 1, "world": 2})) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 1}, "rank 1 of 1 workers"),
        ({"engine": ""}, "engine: "),
        ({"incarnation": 0}, "incarnation: "),
        ({"links": {"ucx": bytes(MAX_STRANGER_FRAME)}}, "the links export too much"),
    ],
)
def test_a_worker_that_no_peer_could_welcome_does_not_start(change: dict[str, Any], says: str) -> None:
    """What is wrong with its name, number or exports is said here, not by every peer."""
    fits = Identity("p", 0, 1, 1, FACTS)
    assert handshake.checked_identity(fits) == fits
    with pytest.raises(SettingsError, match=r"identity of this worker|a Hello of") as error:
        handshake.checked_identity(replace(fits, **change))
    assert says in str(error.value)


def test_a_peer_that_was_given_up_hears_so_and_the_transport_does_not() -> None:
    """The count travels among the links, and is none."""
    me = Identity("p", 0, 1, 1, FACTS, {"ucx": b"x"})
    for breaks in (0, 3):
        hello = handshake.facts(Hello, me, breaks)
        assert handshake.breaks_of(hello) == breaks
        assert (len(hello.links) == 1) == (breaks == 0)
        assert handshake.without_breaks(hello).links == {"ucx": b"x"}


def test_a_stranger_is_not_listened_to_before_it_said_hello(rig: Bench) -> None:
    """Neither a long frame is decoded, nor a word about transfers believed; each is counted, and others are served."""
    node = rig.node("p")
    stranger = Stranger(node.port)
    try:
        stranger.send(encode(Claim(transfer="t")))
        stranger.send(encode(LinkCall(link="ucx", body=bytes(MAX_STRANGER_FRAME + 1))))
        stranger.send(b"one", b"two")
        rig.until(lambda: node.counters["frames_in"] >= 3)
        assert (node.counters["garbage"], node.counters["dropped_unknown_peer"]) == (2, 1)
        assert node.of(MessageReceived) == []
        stranger.send(encode(handshake.facts(Hello, Identity("d", 0, 1, 7, FACTS), 0)))
        stranger.send(encode(Claim(transfer="t")))
        rig.until(lambda: node.of(MessageReceived))
        assert [event.message for event in node.of(MessageReceived)] == [Claim(transfer="t")]
    finally:
        stranger.close()


def test_words_for_a_peer_that_fell_silent_are_dropped_with_its_connection(rig: Bench) -> None:
    """What queued for it must not arrive later, when the transfers that it was about are over: the next words go over a
    new connection, which begins with Hello."""
    a = rig.node("a", heartbeat_s=0.05, liveness_s=0.3)
    b = rig.node("b")
    a.channel.connect(HOST, b.port)
    rig.until(lambda: a.of(PeerUp) and b.of(PeerUp))
    rig.nodes.remove(b)  # it stands still
    (dialer,) = a.channel._dialers.values()
    old = dialer.socket
    assert old is not None
    assert a.channel.send(id_of(b), Claim(transfer="late"))
    rig.until(lambda: a.of(PeerDown))
    assert [down.ended for down in a.of(PeerDown)] == [False]
    assert old.closed
    assert dialer.socket is not old
    assert not a.channel.send(id_of(b), Claim(transfer="later"))
    rig.nodes.append(b)
    rig.until(lambda: len(a.of(PeerUp)) == 2)


def test_a_ping_in_another_process_name_is_no_heartbeat(rig: Bench) -> None:
    """Whoever took over a connection (a forked child, a proxy) must say Hello: its predecessor's standing is not its
    own."""
    node = rig.node("p")
    stranger = Stranger(node.port)
    said: list[object] = []

    def heard(kind: type) -> bool:
        said.extend(decode(frame) for frame in stranger.answers())
        return any(isinstance(message, kind) for message in said)

    try:
        stranger.send(encode(Ping(incarnation=7)))
        rig.until(lambda: heard(Refused))
        stranger.send(encode(handshake.facts(Hello, Identity("d", 0, 1, 7, FACTS), 0)))
        rig.until(lambda: heard(Welcome))
        said.clear()
        stranger.send(encode(Ping(incarnation=8)))
        rig.until(lambda: heard(Refused) or heard(Pong))
        assert [message.field for message in said if isinstance(message, Refused)] == ["hello"]
        stranger.send(encode(Ping(incarnation=7)))
        rig.until(lambda: heard(Pong))
    finally:
        stranger.close()


def test_what_a_peer_had_said_when_it_was_given_up_does_not_cost_it_its_connection(rig: Bench) -> None:
    """It is a stranger again, whose words are dropped, but its budget allows for what was under way."""
    node, other = rig.node("p"), rig.node("d")
    other.channel.connect(HOST, node.port)
    rig.until(lambda: node.of(PeerUp) and other.of(PeerUp))
    node.channel.change_fingerprint({}, "the weights changed")
    for _ in range(10 * STRANGER_FRAMES):
        assert other.channel.send(id_of(node), Claim(transfer="t"))
    rig.until(lambda: len(node.of(PeerUp)) == 2)
    assert node.counters["dropped_unknown_peer"] == 10 * STRANGER_FRAMES
    assert node.counters["callers_cut"] == 0
    assert node.of(MessageReceived) == []
    assert ["the weights changed" in down.reason for down in other.of(PeerDown)] == [True]


def test_a_watcher_that_asks_again_keeps_its_place_in_a_full_house() -> None:
    """Only those who come anew are refused: all who watch renew their leases, however many they are."""
    held: Watchers[int] = Watchers()
    for asked_at in (0.0, WATCH_AGAIN_S, WATCH_LEASE_S, 2 * WATCH_LEASE_S - 1):
        for number in range(MAX_WATCHERS):
            assert held.admit(b"%d" % number, number, asked_at)
        assert not held.admit(b"more", -1, asked_at)
    assert held.all(2 * WATCH_LEASE_S) == [*range(MAX_WATCHERS)]


def test_no_part_of_a_message_of_several_parts_names_its_sender() -> None:
    """Such a message is thrown away whole: a stranger whose second part is another connection's name, and whose third
    is a valid frame, has said nothing in that connection's name."""
    context: zmq.Context[Socket] = zmq.Context()
    try:
        router = context.socket(zmq.ROUTER)
        router.bind("inproc://inbox")
        stranger = context.socket(zmq.DEALER)
        stranger.routing_id = b"stranger"
        stranger.connect("inproc://inbox")
        inbox = Inbox(router, addressed=True)
        for parts in ([b"x", b"victim", b"forged"], [b"y", b"victim"], [b"whole"]):
            stranger.send_multipart(parts)
        letters = []
        while read := inbox.read():
            if isinstance(read, Letter):
                letters.append((read.sender, read.body.bytes if read.body is not None else None))
        assert letters == [(b"stranger", None), (b"stranger", None), (b"stranger", b"whole")]
    finally:
        context.destroy(0)
